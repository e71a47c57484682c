"""Encoders side by side by one command's evaluations, as a Markdown table with intervals and paired differences.

    python benchmarks/encoders.py ENCODER... --data cifar10 --root DIR --out DIR [--on knn,linear_fast] [--json FILE]
    python benchmarks/encoders.py representation:pixels runs/simclr runs/vicreg --random --data cifar20 --root DIR ...

What `mvmr evaluate ENCODER... --resume` does: finished results in DIR are taken as they are. NAME=ENCODER names one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from mvmr.api import evaluate
from mvmr.engine.environment import environment
from mvmr.evaluation.comparison import Comparison, compare
from mvmr.types import Result


def main() -> None:
    arguments = parse()
    named = dict(
        reversed(given.partition("=")[::2]) if "=" in given else (given, given) for given in arguments.encoders
    )
    results = evaluate(
        list(named), data=arguments.data, root=arguments.root, on=arguments.on.split(","), random=arguments.random,
        out=arguments.out, resume=True,
        progress=lambda what, done, total: print(f"\r{what}: {done} of {total}   ", end="", flush=True),
    )  # fmt: skip
    print("\r" + " " * 60)
    of_name = {name: encoder for encoder, name in named.items()}
    differences = compare(results, against=of_name.get(arguments.against, arguments.against))
    print(table(results, differences, named))
    if arguments.json:
        listed = [{**result.as_json(), "encoder": named.get(result.encoder, result.encoder)} for result in results]
        ahead = [{**asdict(d), "encoder": named.get(d.encoder, d.encoder), "against": named.get(d.against, d.against)}
                 for d in differences]  # fmt: skip
        content = {"results": listed, "differences": ahead, "environment": environment()}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def table(results: list[Result], differences: list[Comparison], named: dict[str, str]) -> str:
    """One row an encoder, two columns an evaluation: its leading metric, and how far it is ahead of the reference."""
    kinds = list(dict.fromkeys(result.evaluation for result in results))
    first = {kind: _leading(next(r for r in results if r.evaluation == kind)) for kind in kinds}
    reference = differences[0].against if differences else ""
    head = [
        f"{kind} ({first[kind]})" + (f" | ahead of {named.get(reference, reference)}" if reference else "")
        for kind in kinds
    ]
    lines = ["| encoder | " + " | ".join(head) + " |", "|" + "---|" * (1 + len(kinds) * (2 if reference else 1))]
    ahead = {(d.encoder, d.evaluation, d.metric): d for d in differences}
    for encoder in dict.fromkeys(result.encoder for result in results):
        cells = []
        for kind in kinds:
            metrics = next(r.metrics for r in results if (r.encoder, r.evaluation) == (encoder, kind))
            name = first[kind]
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            ends = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
            cells.append(f"{metrics[name]:.1f}{ends}")
            if reference:
                d = ahead.get((encoder, kind, name))
                cells.append("" if d is None else f"{d.difference:+.1f} [{d.low:+.1f}, {d.high:+.1f}]")
        lines.append(f"| {named.get(encoder, encoder)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _leading(result: Result) -> str:
    """The metric that stands for an evaluation: top1, or the first that has an interval, or the first."""
    sure = (name for name in ("top1", *result.metrics) if f"{name}_low" in result.metrics)
    return next(sure, next(iter(result.metrics)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", metavar="[NAME=]ENCODER")
    parser.add_argument("--data", required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--on", default="knn,linear_fast")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", help="whom differences are to; the first encoder by default")
    parser.add_argument("--random", action="store_true", help="also the first network with random weights")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
