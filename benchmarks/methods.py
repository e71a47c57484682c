"""Every method at one budget: the same images, encoder and epochs, judged by the same evaluations.

    python benchmarks/methods.py --root DIR --out DIR [--methods simclr,moco,...] [--seed N] [--threads N] [KEY=VALUE]

Trains the recipe METHOD_cifar10_cpu of each method in a process of its own, so that its peak memory is its own, and
evaluates it on CIFAR-10's official test set by `knn` and `linear_fast`, beside the same net with random weights.
Writes OUT/METHOD-SEED.json for each and prints the table of all records in OUT. Runs that have ended are not repeated,
so that two processes may share OUT with different methods.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from measured_run import top1_of, trained, watched

from mvmr.api import evaluate
from mvmr.config import load, recipe_names
from mvmr.engine.environment import environment
from mvmr.methods import METHODS

SUFFIX = "_cifar10_cpu"
PROTOCOLS = ("knn", "linear_fast")


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for method in arguments.methods.split(","):
        record = arguments.out / f"{method}-{arguments.seed}.json"
        if not record.exists():
            record.write_text(json.dumps(measured(method, arguments), indent=2) + "\n")
    print(table([json.loads(path.read_text()) for path in sorted(arguments.out.glob("*-*.json"))]))


def measured(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    run, recipe = arguments.out / f"{method}-{arguments.seed}", f"{method}{SUFFIX}"
    settings = [f"data.root={arguments.root}", f"seed={arguments.seed}", *arguments.overrides]
    cost = trained(recipe, settings, run, threads=arguments.threads)
    random = known_random(recipe, arguments)
    results = evaluate(run, data="cifar10", root=arguments.root, on=PROTOCOLS, random=random is None)
    return {
        "method": method, "recipe": recipe, "overrides": arguments.overrides, "seed": arguments.seed,
        "threads": arguments.threads, **cost, **watched(run), "trained": top1_of(results),
        "random": random or top1_of(results, random=True), "environment": environment(),
    }  # fmt: skip


def known_random(recipe: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    """The scores of the same net with random weights, which never change, where a record of OUT has them."""
    own = load(recipe, arguments.overrides).encoder
    for path in arguments.out.glob("*-*.json"):
        record = json.loads(path.read_text())
        if load(record["recipe"], record["overrides"]).encoder == own:
            return record["random"]
    return None


def table(records: list[dict[str, Any]]) -> str:
    """All records as a Markdown table, the best kNN first."""
    lines = [
        "| method | seed | kNN (random) | linear_fast (random) | RankMe | std "
        "| minutes | processor minutes | images/s | peak GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda record: -record["trained"]["knn"]):
        scores = [f"{r['trained'][name]:.1f} ({r['random'][name]:.1f})" for name in PROTOCOLS]
        rest = f"{r['rankme']:.1f} | {r['embedding_std']:.3f} | {r['minutes']:.1f} | {r['processor_minutes']:.1f}"
        rest += f" | {r['images_per_second']:.0f}"
        lines.append(f"| `{r['method']}` | {r['seed']} | {' | '.join(scores)} | {rest} | {r['peak_gigabytes']:.1f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    there = [name for name in sorted(METHODS) if f"{name}{SUFFIX}" in recipe_names()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(there))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
