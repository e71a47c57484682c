"""mvmr evaluate: judge frozen encoders, one or several side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

SETTING = re.compile(r"[a-z_]+\.[a-z_0-9.]+=.*", re.DOTALL)
"""An argument of this form is a setting, any other an encoder."""


def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="ENCODER... [EVALUATION.KEY=VALUE]...",
            help="Run folders, encoder.safetensors files, timm:NAME, torchvision:NAME or representation:NAME.",
        ),
    ],
    data: Annotated[str | None, typer.Option(help="Data set (`mvmr list data`); by default the first run's.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    on: Annotated[str, typer.Option(help="Evaluations, separated by commas (`mvmr list evaluations`); or knn.")] = "",
    recipe: Annotated[str | None, typer.Option(help="An evaluation recipe (`mvmr list recipes`) or YAML file.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Also the first network with random weights.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results; by default each run's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take finished results that are there.")] = False,
    keep: Annotated[bool, typer.Option("--keep-features/--no-keep-features", help="In the cache folder.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Evaluate frozen encoders on a labelled data set, side by side; results go into the run folders too."""
    from mvmr.api import evaluate as evaluate_encoders
    from mvmr.cli.screen import show_results
    from mvmr.config import pairs
    from mvmr.engine.progress import counting
    from mvmr.errors import UserError

    encoders = [argument for argument in arguments if not SETTING.fullmatch(argument)]
    if not encoders:
        raise UserError("ENCODER is missing: name a run folder, an encoder.safetensors, timm:NAME or torchvision:NAME")
    chosen = dict(pairs([argument for argument in arguments if SETTING.fullmatch(argument)]))
    names = [name for name in on.split(",") if name]
    with counting() as progress:
        results = evaluate_encoders(
            encoders, data=data, root=root, on=names, settings=chosen, random=random, recipe=recipe, out=out,
            resume=resume, keep_features=keep, progress=progress,
        )  # fmt: skip
    show_results(results, as_json=as_json)
