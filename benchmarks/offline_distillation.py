"""Distillation methods at one budget: one fixed teacher, one small student, equal images, views and epochs.

    python benchmarks/offline_distillation.py --root DIR --teacher ENCODER --out DIR [--methods mvmr,seed,...]
        [--width 0.125] [--epochs N] [--seed N] [--threads N] [KEY=VALUE]

Trains each method's recipe *_cifar10_cpu with the teacher in a process of its own, and judges the student on CIFAR-10's
official test set by `linear`, `linear_fast` and `knn`, beside the teacher and the student with random weights. The
teacher's embeddings are computed once and shared. `alone` is MV-MR without a teacher; `mvmr_with_five` has its five
representations and the teacher. Writes OUT/NAME-SEED.json for each and prints the table of all records in OUT. Runs
that have ended are not repeated, so that two processes may share OUT with different methods.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from measured_run import top1_of, trained, watched

from mvmr.api import evaluate
from mvmr.engine.environment import environment
from mvmr.nets.weights import load_encoder

PROTOCOLS = ("linear", "linear_fast", "knn")
FIVE = [f"representations.{name}={{}}" for name in ("pixels", "scattering", "augmented_pixels", "hog", "local_std")]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "mvmr": ("mvmr_teacher", []),
    "mvmr_with_five": ("mvmr_teacher", ["method.beta.teacher=4.0", *FIVE]),
    "seed": ("seed", []),
    "compress_1q": ("compress", ["method.queues=1"]),
    "compress_2q": ("compress", ["method.queues=2"]),
    "crd": ("crd", []),
    "cluster_fit": ("cluster_fit", []),
    "regression": ("regression", ["method.batch_norm=false"]),
    "regression_bn": ("regression", ["method.batch_norm=true"]),
    "alone": ("mvmr", []),
}
"""{name in the table: (recipe without its ending, settings that make it that)}."""


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.methods.split(","):
        record = arguments.out / f"{name}-{arguments.seed}.json"
        if not record.exists():
            record.write_text(json.dumps(measured(name, arguments), indent=2) + "\n")
    judge_teacher(arguments)
    print(table([json.loads(path.read_text()) for path in sorted(arguments.out.glob("*-*.json"))]))


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    start, settings = VARIANTS[name]
    run, recipe = arguments.out / f"{name}-{arguments.seed}", f"{start}_cifar10_cpu"
    words = [f"data.root={arguments.root}", f"seed={arguments.seed}", f"encoder.width={arguments.width}"]
    words += [f"schedule.epochs={arguments.epochs}", *settings]
    if name != "alone":
        words.append(f"representations.teacher.model={arguments.teacher}")
    cost = trained(recipe, [*words, *arguments.overrides], run, threads=arguments.threads)
    results = evaluate(run, data="cifar10", root=arguments.root, on=PROTOCOLS, random=name == "alone")
    random = top1_of(results, random=True)
    encoder = load_encoder(run)
    return {
        "name": name, "recipe": recipe, "settings": settings, "overrides": arguments.overrides,
        "width": arguments.width, "parameters": sum(p.numel() for p in encoder.backbone.parameters()),
        "seed": arguments.seed, "threads": arguments.threads, **cost, **watched(run),
        "processor_seconds_per_epoch": 60 * cost["processor_minutes"] / arguments.epochs,
        "student": top1_of(results), **({"random": random} if random else {}), "environment": environment(),
    }  # fmt: skip


def judge_teacher(arguments: argparse.Namespace) -> None:
    """The teacher by the same evaluations, into OUT/teacher-SEED.json, once."""
    record = arguments.out / f"teacher-{arguments.seed}.json"
    if record.exists():
        return
    results = evaluate(arguments.teacher, data="cifar10", root=arguments.root, on=PROTOCOLS)
    parameters = sum(p.numel() for p in load_encoder(arguments.teacher).backbone.parameters())
    values = {"name": "teacher", "parameters": parameters, "student": top1_of(results), "environment": environment()}
    record.write_text(json.dumps(values, indent=2) + "\n")


def table(records: list[dict[str, Any]]) -> str:
    """All records as a Markdown table: the teacher, the students (the best kNN first), and the random one."""
    lines = [
        "| network | linear | linear_fast | kNN | RankMe | processor seconds an epoch | images/s | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda record: -record["student"]["knn"]):
        rest = "| | | | |"
        if "processor_minutes" in r:
            seconds, speed = r["processor_seconds_per_epoch"], r["images_per_second"]
            rest = f"| {r['rankme']:.1f} | {seconds:.0f} | {speed:.0f} | {r['peak_gigabytes']:.1f} |"
        lines.append(f"| {r['name']} | {scores(r['student'])} {rest}")
    lines += [f"| random student | {scores(r['random'])} | | | | |" for r in records if "random" in r]
    return "\n".join(lines)


def scores(top1: dict[str, float]) -> str:
    return " | ".join(f"{top1[protocol]:.1f}" for protocol in PROTOCOLS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True, help="a run folder or an encoder.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(VARIANTS))
    parser.add_argument("--width", type=float, default=0.125, help="of the student's ResNet-18")
    parser.add_argument("--epochs", type=int, default=18, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
