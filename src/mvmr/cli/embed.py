"""mvmr embed: features of every image."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Split(StrEnum):
    """Splits that can be embedded."""

    pretrain = "pretrain"
    train = "train"
    test = "test"


def embed(
    encoder: Annotated[str, typer.Argument(help="Run folder, encoder.safetensors, timm:NAME or torchvision:NAME.")],
    out: Annotated[Path, typer.Option(help="File to write, .npz.")],
    data: Annotated[str | None, typer.Option(help="Data set (`mvmr list data`); by default the run's own.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    split: Annotated[Split, typer.Option(help="pretrain is every training image.")] = Split.pretrain,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write features, labels and file names of a data set."""
    from mvmr.api import embed as embed_images
    from mvmr.cli.screen import say, show_json
    from mvmr.engine.progress import counting

    with counting() as progress:
        features = embed_images(encoder, data=data, root=root, split=split.value, out=out, progress=progress)
    images, dim = features.x.shape
    if as_json:
        show_json({"file": str(out), "images": images, "dim": dim, "labels": features.y is not None})
    else:
        say(f"{images} images x {dim} features: {out}")
