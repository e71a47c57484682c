"""mvmr splits: random splits of a COCO training set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def splits(
    annotations: Annotated[Path, typer.Argument(help="A file of COCO's instances, as instances_train2017.json.")],
    size: Annotated[int, typer.Option(help="Images of each split.")] = 1000,
    count: Annotated[int, typer.Option(help="Splits; no image is in two.")] = 5,
    seed: Annotated[int, typer.Option(help="Another seed draws others.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; by default that of ANNOTATIONS.", show_default=False)
    ] = None,
    rest: Annotated[bool, typer.Option("--rest", help="Also write the images that are in no split.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Draw splits of a COCO training set that do not overlap, for transfer with few labels."""
    from mvmr.cli.screen import say, show_json
    from mvmr.data.coco_splits import write_splits

    files = write_splits(annotations, size=size, count=count, seed=seed, out=out, rest=rest)
    if as_json:
        show_json({"files": [str(file) for file in files], "size": size, "seed": seed})
    else:
        for file in files:
            say(str(file))
