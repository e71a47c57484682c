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
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mvmr.api import evaluate
from mvmr.config import recipe_names
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
    run = arguments.out / f"{method}-{arguments.seed}"
    cost = trained(method, run, arguments)
    results = evaluate(run, data="cifar10", root=arguments.root, on=PROTOCOLS, random=True)
    top1 = {
        label: {r.evaluation: r.metrics["top1"] for r in results if (r.encoder == "random") == (label == "random")}
        for label in ("trained", "random")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    watched = [line for line in lines if "rankme" in line]
    return {
        "method": method, "recipe": f"{method}{SUFFIX}", "overrides": arguments.overrides, "seed": arguments.seed,
        "threads": arguments.threads, **cost,
        "images_per_second": statistics.median(speeds), "rankme": watched[-1]["rankme"],
        "embedding_std": watched[-1]["embedding_std"], **top1, "environment": environment(),
    }  # fmt: skip


def trained(method: str, run: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Minutes on the clock, minutes of processor time and peak gigabytes of the training process, all in it counted."""
    words = [
        sys.executable, "-m", "mvmr", "train", f"{method}{SUFFIX}", f"data.root={arguments.root}",
        f"seed={arguments.seed}", *arguments.overrides, "--out", str(run),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "MKL_NUM_THREADS": str(arguments.threads)}
    started = time.monotonic()
    with open(arguments.out / f"{method}-{arguments.seed}.log", "w") as log:
        process = subprocess.Popen(words, env={**os.environ, **threads}, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{method}: training failed, see {log.name}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {
        "minutes": (time.monotonic() - started) / 60,
        "processor_minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "peak_gigabytes": kilobytes / 2**20,
    }


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
