"""mvmr rank: a run's checkpoints in the order of label-free diagnostics, beside a probe's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rank(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN | ENCODER... [EVALUATION.KEY=VALUE]...", help="A run folder, or encoders to tell apart."
        ),
    ],
    data: Annotated[str | None, typer.Option(help="Data set (`mvmr list data`); by default the run's own.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    probe: Annotated[str, typer.Option(help="Evaluation to compare with; `none` reads no label.")] = "knn",
    online: Annotated[bool, typer.Option("--online", help="From what the run watched itself; nothing is run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Rank a run's checkpoints without labels, and say how far that is a probe's ranking."""
    from mvmr.api import evaluate
    from mvmr.cli.evaluate import SETTING
    from mvmr.cli.screen import show_json, show_table
    from mvmr.config import pairs
    from mvmr.engine.progress import counting
    from mvmr.errors import UserError
    from mvmr.evaluation.ranking import PROBES, checkpoints_of, epochs_of, rank_checkpoints

    encoders = [argument for argument in arguments if not SETTING.fullmatch(argument)]
    chosen = dict(pairs([argument for argument in arguments if SETTING.fullmatch(argument)]))
    if not encoders:
        raise UserError("RUN is missing: name a run folder, or several encoders")
    if probe not in (*PROBES, "none"):
        raise UserError(f"--probe {probe}: has no top1 to compare with; take one of {', '.join(PROBES)}, or none")
    if online:
        if len(encoders) > 1:
            raise UserError("--online reads one run's own measures; give one run folder")
        if chosen:
            raise UserError(f"{', '.join(chosen)}: no effect with --online, which computes nothing; leave it out")
        scores, accuracies = epochs_of(encoders[0], probe=None if probe == "none" else f"{probe}/top1")
    else:
        single = Path(encoders[0])
        given = checkpoints_of(single) if len(encoders) == 1 and single.is_dir() else [Path(name) for name in encoders]
        names = {str(path): path.stem if path.suffix else str(path) for path in given}
        if len(set(names.values())) < len(names):
            names = {name: name for name in names}
        on = ["diagnostics"] if probe == "none" else ["diagnostics", probe]
        with counting() as progress:
            results = evaluate(list(names), data=data, root=root, on=on, settings=chosen, progress=progress)
        scores = {names[r.encoder]: r.metrics for r in results if r.evaluation == "diagnostics"}
        measured = {names[r.encoder]: r.metrics for r in results if r.evaluation == probe}
        accuracies = {name: metrics["top1"] for name, metrics in measured.items()} or None
    rankings = rank_checkpoints(scores, accuracies)
    if as_json:
        listed = {name: vars(ranking) for name, ranking in rankings.items()}
        show_json({"diagnostics": scores, "accuracies": accuracies, "rankings": listed})
        return
    rows = [
        [name, r.order[0], r.order[-1], *("" if v is None else f"{v:.2f}" for v in (r.tau, r.rho, r.cost))]
        for name, r in rankings.items()
    ]
    columns = ["diagnostic", "best", "worst", "Kendall's tau", "Spearman's rho", "points lost by its choice"]
    title = f"{len(scores)} checkpoints" + ("" if accuracies is None else f", beside {probe}'s ranking")
    show_table(title, columns, rows)
