"""mvmr evaluate: judge a frozen encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    encoder: Annotated[str, typer.Argument(help="Run folder, encoder.safetensors, timm:NAME or torchvision:NAME.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[EVALUATION.KEY=VALUE]...", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data set (`mvmr list data`); by default the run's own.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    on: Annotated[str, typer.Option(help="Evaluations, separated by commas (`mvmr list evaluations`); or knn.")] = "",
    recipe: Annotated[str | None, typer.Option(help="An evaluation recipe (`mvmr list recipes`) or YAML file.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Also the same net with random weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Evaluate a frozen encoder on a labelled data set; results go into the run folder too."""
    from mvmr.api import evaluate as evaluate_encoder
    from mvmr.cli.screen import show_results
    from mvmr.config import pairs
    from mvmr.engine.progress import counting

    chosen = dict(pairs(settings or ()))
    names = [name for name in on.split(",") if name]
    with counting() as progress:
        results = evaluate_encoder(
            encoder, data=data, root=root, on=names, settings=chosen, random=random, recipe=recipe, progress=progress
        )
    show_results(results, as_json=as_json)
