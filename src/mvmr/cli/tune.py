"""mvmr tune: numbers for the batch size and the learning rate, in a resolved recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ROWS = 20
"""Rows of the curve that is shown; the file has all of it."""
BAR = 30
"""Characters of its longest bar."""


def tune(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (`mvmr list recipes`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings changed.", show_default=False)
    ] = None,
    batch_size: Annotated[bool, typer.Option("--batch-size", help="Search the largest batch that fits.")] = False,
    lr: Annotated[bool, typer.Option("--lr", help="Search a learning rate by a range test.")] = False,
    out: Annotated[Path | None, typer.Option(help="Recipe to write; NAME.tuned.yaml unless given.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Try no larger batch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Search a batch size and a learning rate (both unless one is named); writes a resolved recipe."""
    from mvmr.cli.screen import own_name, say, show_json, show_table
    from mvmr.config import load
    from mvmr.engine.tune import save
    from mvmr.engine.tune import tune as tune_run

    run = load(recipe, overrides or ())
    file = out or Path(f"{run.name}.tuned.yaml")
    both = not (batch_size or lr)
    tuned = tune_run(run, batch_size=batch_size or both, lr=lr or both, max_batch_size=max_batch_size)
    curves = save(tuned, file)
    if as_json:
        show_json({"file": str(file), "curves": str(curves), **tuned.record})
        return
    for title, columns, rows in tables(tuned.record):
        show_table(title, columns, rows)
    say(f"recipe: {file}\ncurves: {curves}\nnext: {own_name()} train {file}")


def tables(record: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of every search that was made."""
    shown = []
    if "batch_size" in record:
        found = record["batch_size"]
        rows = [
            [
                str(trial["batch_size"]),
                "fits" if trial["works"] else "out of memory",
                "" if trial["peak_bytes"] is None else f"{trial['peak_bytes'] / 1e9:.2f}",
                "" if trial["images_per_second"] is None else f"{trial['images_per_second']:.0f}",
            ]
            for trial in found["trials"]
        ]
        title = f"data.batch_size: {found['found']} ({found['limit']})"
        shown.append((title, ["batch", "outcome", "peak memory, GB", "images/s"], rows))
    if "lr" in record:
        lr = record["lr"]
        kept = f"none found, {lr['recipe']} is kept"
        title = f"optimizer.lr: {kept if lr['found'] is None else format(lr['found'], 'g')}"
        shown.append((title, ["rate", "loss", ""], curve(lr["rates"], lr["losses"])))
    return shown


def curve(rates: list[float], losses: list[float]) -> list[list[str]]:
    """Rows of rate, mean loss and a bar; each row is of some neighbouring steps."""
    step = max(1, -(-len(rates) // ROWS))
    parts = [losses[i : i + step] for i in range(0, len(losses), step)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    widths = [round(BAR * (mean - low) / (high - low)) if high > low else 0 for mean in means]
    return [
        [f"{rates[i * step]:.1e}", f"{mean:.4g}", "#" * width]
        for i, (mean, width) in enumerate(zip(means, widths, strict=True))
    ]
