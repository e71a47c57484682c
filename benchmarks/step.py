"""Images per second of a full MV-MR step and of its networks alone, in one run, and their ratio.

    python benchmarks/step.py [RECIPE] [--steps N] [--device cpu|cuda] [--json FILE]

The full step is what training does: images to views and representations, the encoder and projector forward on both
views, the loss, backward, and the optimiser's update. The bare step is the forward and backward of the same encoder and
projector on the same two views, made beforehand. The two alternate, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mvmr.config import load
from mvmr.data.module import TrainingData
from mvmr.engine.environment import environment
from mvmr.engine.optim import build_optimizer
from mvmr.engine.train import build
from mvmr.types import Batch, Step


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    run = load(arguments.recipe, arguments.overrides)
    parts = build(run)
    data = TrainingData(parts.source, parts.maker, batch_size=run.data.batch_size, seed=0, workers=run.data.workers)
    method, maker = parts.method.to(device).train(), parts.maker.to(device)
    optimizer = build_optimizer(method.parameter_groups(), run.optimizer, run.peak_lr)
    loader = data.loader()
    loaded = [batch for batch, _ in zip(loader, range(arguments.steps), strict=False)]
    fixed = maker(loaded[0], device)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def full(number: int) -> None:
        optimizer.zero_grad()
        with cast:
            loss = method.loss(maker(loaded[number % len(loaded)], device), Step(number, 1000, 100))["loss"]
        loss.backward()
        optimizer.step()

    def bare(number: int) -> None:
        method.zero_grad()
        with cast:
            total = sum(z.float().square().mean() for z in method.embed(fixed).values())
        assert isinstance(total, torch.Tensor)
        total.backward()

    def views(number: int) -> None:
        maker.views(loaded[number % len(loaded)].images.to(device), loaded[number % len(loaded)].index, 0)

    def representations(number: int) -> None:
        with torch.no_grad():
            maker.features(fixed.views["plain"][0], fixed.index, number)

    def objective(number: int) -> None:
        leaves = {key: z.detach().float().requires_grad_() for key, z in embeddings.items()}
        method.objective(leaves, fixed, Step(0, 1, 1))["loss"].backward()

    with torch.no_grad(), cast:
        embeddings = method.embed(fixed)
    works: dict[str, Callable[[int], None]] = {
        "full step": full, "bare networks": bare, "views": views, "representations": representations, "loss": objective,
    }  # fmt: skip
    report(arguments, run.data.batch_size, time_all(works, arguments.steps, device), fixed)


def time_all(works: dict[str, Callable[[int], None]], steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work at each step, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-2, steps):
        for name, work in works.items():
            wait(device)
            started = time.perf_counter()
            work(max(number, 0))
            wait(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(arguments: argparse.Namespace, batch: int, seconds: dict[str, list[float]], fixed: Batch) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    where = environment()
    print(f"{arguments.recipe}, batch {batch}, {arguments.steps} steps, {where['gpus'] or where['processor']}, "
          f"{where['threads']} threads, torch {where['libraries']['torch']}")  # fmt: skip
    for name, median in medians.items():
        print(f"{name:16s} {1000 * median:9.1f} ms   {batch / median:9.0f} images/s")
    ratio = medians["full step"] / medians["bare networks"]
    print(f"a full step costs {ratio:.2f} of the bare networks on the same two views")
    if arguments.json:
        result = {"recipe": arguments.recipe, "batch": batch, "steps": arguments.steps, "median_seconds": medians,
                  "ratio": ratio, "representations": {k: list(v.shape) for k, v in fixed.representations.items()},
                  "environment": where}  # fmt: skip
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mvmr_cifar10_cpu")
    parser.add_argument("overrides", nargs="*", help="KEY.SUB=VALUE, for example data.root=DIR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
