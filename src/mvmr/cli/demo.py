"""mvmr demo: the main job on a data set that ships with a dependency: no download, no GPU, no account."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mvmr.data.layouts import Split
    from mvmr.nets.weights import Encoder
    from mvmr.types import Features

DRAWS = 5
ROWS = {"kNN": "knn", "linear, all labels": "linear", f"linear, 10 labels a class (mean of {DRAWS} draws)": "few"}


def demo(
    out: Annotated[Path, typer.Option(help="Run folder; a number is added when it exists.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Learn from handwritten digits without their labels in under two minutes, and show what was learned."""
    import time

    from mvmr.cli.screen import own_name, say, show_json, show_table
    from mvmr.config import load
    from mvmr.engine.train import train
    from mvmr.nets.weights import load_encoder, random_encoder

    started = time.monotonic()
    folder = free_name(out)
    run = load("mvmr_digits")
    say(f"Training a small ResNet on 1,297 digits, without their labels, for {run.schedule.epochs} epochs: {folder}")
    train(run, folder)
    trained = load_encoder(folder)
    columns = {"random encoder": measure(random_encoder(trained.card, seed=0)), "trained encoder": measure(trained)}
    seconds = time.monotonic() - started
    following = [
        f"{own_name()} evaluate {folder} --on knn,linear_fast --random",
        f"{own_name()} train mvmr_folder data.root=YOUR_IMAGES",
    ]
    if as_json:
        show_json({"folder": str(folder), "top1": columns, "seconds": round(seconds, 1), "next": following})
        return
    rows = [[title, *(f"{column[key]:.1f}" for column in columns.values())] for title, key in ROWS.items()]
    show_table("Accuracy (%) on 500 digits held out", ["", *columns], rows)
    say(f"{seconds:.0f} seconds. Now try:\n  " + "\n  ".join(following))


def free_name(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: a run is never written over."""
    number, name = 2, folder
    while name.exists():
        name, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return name


def measure(encoder: Encoder) -> dict[str, float]:
    """Accuracies of one encoder on the digits held out, in percent."""
    from mvmr.data.sources import DataConfig, open_source
    from mvmr.evaluation.features import features_of
    from mvmr.evaluation.knn import KNNConfig, knn
    from mvmr.evaluation.linear import LinearFastConfig, linear_fast

    def features(split: Split) -> Features:
        return features_of(encoder, open_source(DataConfig(), split, size=encoder.card.image_size))

    train, test = features("train"), features("test")
    few = [linear_fast(train, test, LinearFastConfig(labels_per_class=10, seed=seed))["top1"] for seed in range(DRAWS)]
    return {
        "knn": knn(train, test, KNNConfig())["top1"],
        "linear": linear_fast(train, test, LinearFastConfig())["top1"],
        "few": sum(few) / DRAWS,
    }
