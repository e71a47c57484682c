"""mvmr export: an encoder's weights for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    encoder: Annotated[str, typer.Argument(help="Run folder, encoder.safetensors, or torchvision:NAME.")],
    to: Annotated[str, typer.Option(help="detectron2 or torchvision.")],
    out: Annotated[
        Path, typer.Option(help="File to write: .pkl for detectron2; .pth or .safetensors for torchvision.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Write an encoder's weights for another library, and say what must be set there."""
    from mvmr.cli.screen import say, show_json
    from mvmr.nets.export import export as export_encoder
    from mvmr.nets.weights import load_encoder

    done = export_encoder(load_encoder(encoder), to, out)
    if as_json:
        show_json({"file": str(done.file), "format": done.format, "tensors": done.tensors, "notes": done.notes})
    else:
        say(f"{done.tensors} tensors: {done.file}\nTo use it:\n{done.notes}")
