"""mvmr train: from a recipe to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (`mvmr list recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings changed.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder's last checkpoint.")] = False,
) -> None:
    """Train a recipe; the run folder gets settings, metrics, checkpoints and encoder.safetensors."""
    from mvmr.api import default_folder
    from mvmr.cli.screen import own_name, say
    from mvmr.config import load
    from mvmr.engine.train import train as train_run

    run = load(recipe, overrides or ())
    folder = train_run(run, out or default_folder(recipe, run.name), resume=resume)
    say(f"encoder: {folder / 'encoder.safetensors'}\nnext: {own_name()} evaluate {folder} --on knn,linear_fast")
