"""What distillation adds to self-supervision: one student, one budget, with and without a frozen teacher.

    python benchmarks/distillation.py --root DIR --teacher ENCODER --out DIR [--data cifar10,cifar100] [--epochs N]

For each data set the student of `mvmr_clip_cifar100_cpu` (a quarter-width ResNet-18) is trained by MV-MR twice, on the
same images, for the same epochs, with the same views, projector, batches and rates: with the five hand-crafted
representations of `mvmr_cifar20_cpu`, and with the teacher's embedding as a sixth. No label is used. Writes
OUT/table.json: parameters, and linear and kNN accuracy in percent on the official test split, of the teacher, the
student with random weights, and the two trained ones. Runs that have ended are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mvmr.api import evaluate, train
from mvmr.engine.environment import environment
from mvmr.nets.weights import ENCODER_FILE, load_encoder

PROTOCOLS = ("linear_fast", "knn", "linear")


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"data": {"root": str(arguments.root)}, "seed": arguments.seed}
    common["schedule"] = {"epochs": arguments.epochs}
    rows = []
    for data in arguments.data.split(","):
        alone, taught = arguments.out / f"{data}_alone", arguments.out / f"{data}_taught"
        own = {**common, "data": {**common["data"], "name": data}}
        with_teacher = {**own, "representations.teacher.model": str(arguments.teacher)}
        minutes = {
            taught: trained("mvmr_clip_cifar100_cpu", taught, with_teacher),
            alone: trained("mvmr_cifar20_cpu", alone, own),
        }
        for name, encoder, random in (
            ("teacher", arguments.teacher, False), ("self-supervised", alone, True), ("distilled", taught, False),
        ):  # fmt: skip
            results = evaluate(encoder, data=data, root=arguments.root, on=PROTOCOLS, random=random)
            for label in sorted({result.encoder for result in results}):
                top1 = {r.evaluation: r.metrics["top1"] for r in results if r.encoder == label}
                rows.append({
                    "data": data, "encoder": "random student" if label == "random" else name,
                    "parameters": sum(p.numel() for p in load_encoder(encoder).backbone.parameters()),
                    "minutes": None if label == "random" else minutes.get(encoder), **top1,
                })  # fmt: skip
                print(rows[-1], flush=True)
    record = {"rows": rows, "epochs": arguments.epochs, "seed": arguments.seed, "environment": environment()}
    (arguments.out / "table.json").write_text(json.dumps(record, indent=2) + "\n")


def trained(recipe: str, out: Path, overrides: dict[str, Any]) -> float:
    """Minutes that the run took, the cache of its representations included."""
    if not (out / ENCODER_FILE).exists():
        started = time.monotonic()
        train(recipe, out=out, quiet=True, **overrides)
        (out / "minutes.txt").write_text(f"{(time.monotonic() - started) / 60:.1f}\n")
    return float((out / "minutes.txt").read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True, help="a run folder or an encoder.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="cifar10,cifar100")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
