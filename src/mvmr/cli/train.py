"""mvmr train: from a recipe to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mvmr.config import Run


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (`mvmr list recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings changed.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder's last checkpoint.")] = False,
    auto_bs: Annotated[bool, typer.Option("--auto-bs", help="First search the largest batch that fits.")] = False,
    auto_lr: Annotated[bool, typer.Option("--auto-lr", help="First search a learning rate.")] = False,
) -> None:
    """Train a recipe; the run folder gets settings, metrics, checkpoints and encoder.safetensors."""
    from mvmr.api import default_folder
    from mvmr.cli.screen import own_name, say
    from mvmr.config import load
    from mvmr.engine.train import train as train_run

    run = load(recipe, overrides or ())
    folder = out or default_folder(recipe, run.name)
    if auto_bs or auto_lr:
        run = tuned_run(run, folder, batch_size=auto_bs, lr=auto_lr, resume=resume)
    train_run(run, folder, resume=resume)
    say(f"encoder: {folder / 'encoder.safetensors'}\nnext: {own_name()} evaluate {folder} --on knn,linear_fast")


def tuned_run(run: Run, folder: Path, *, batch_size: bool, lr: bool, resume: bool) -> Run:
    """The run with what `mvmr tune` finds; the run folder gets the resolved recipe as tuned.yaml, with its curves."""
    from mvmr.cli.screen import say
    from mvmr.engine.train import CONFIG
    from mvmr.engine.tune import save, tune
    from mvmr.errors import UserError

    flags = " and ".join(flag for flag, given in (("--auto-bs", batch_size), ("--auto-lr", lr)) if given)
    if resume:
        raise UserError(
            f"--resume continues with what the run was started with: leave out {flags} and resume with "
            f"`mvmr train {folder / CONFIG} --resume`"
        )
    if (folder / CONFIG).exists():  # told before minutes are spent on a search
        raise UserError(f"{folder} already holds a run: give another folder with --out")
    tuned = tune(run, batch_size=batch_size, lr=lr)
    save(tuned, folder / "tuned.yaml")
    found = {"data.batch_size": tuned.run.data.batch_size, "optimizer.lr": tuned.run.optimizer.lr}
    say(f"tuned: {', '.join(f'{key}={value}' for key, value in found.items())}, see {folder / 'tuned.yaml'}")
    return tuned.run
