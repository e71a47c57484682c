"""What the cache of representations saves: seconds an epoch with it, without it, and without any representation.

    python benchmarks/cache.py [RECIPE] [KEY=VALUE ...] [--images N] [--device cpu|cuda] [--json FILE]

Three makers of batches serve one and the same method, and take turns step by step over an epoch of N images, so that a
change of the machine's speed meets all three: `none` has no representations, `cached` looks them up, `off` computes
them. A step is all that training does: images to views and representations, forward, loss, backward, update. The cache
is built anew in a temporary folder, and what that costs once is reported too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvmr.config import Run, load
from mvmr.data.batches import BatchMaker
from mvmr.data.module import TrainingData
from mvmr.engine.environment import environment
from mvmr.engine.optim import build_optimizer
from mvmr.engine.train import Parts, build
from mvmr.representations.cache import CacheRequest, cache_representations
from mvmr.types import Step

WARM_UP = 2
"""Steps of each maker before the clock starts."""


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        run = load(arguments.recipe, [*arguments.overrides, f"data.limit={arguments.images}", f"data.cache={folder}"])
        parts = build(run)
        makers = {name: BatchMaker(parts.maker.views, parts.maker.representations) for name in ("cached", "off")}
        makers["none"] = BatchMaker(parts.maker.views, nn.ModuleDict())
        started = time.monotonic()
        kept = fill(run, parts, device)
        once = time.monotonic() - started
        makers["cached"].kept = {name: rows.rows for name, rows in kept.items()}
        seconds = epoch(run, parts, makers, device)
        stored = sum(file.stat().st_size for file in Path(folder).rglob("shard-*"))
    steps = len(seconds["none"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "recipe": arguments.recipe,
        "overrides": [text for text in arguments.overrides if not text.startswith("data.root=")],
        "images": arguments.images, "steps": steps,
        "batch_size": run.data.batch_size, "cached": sorted(kept), "device": arguments.device,
        "seconds_once": once, "bytes_an_image": stored / arguments.images,
        "seconds_an_epoch": {name: sum(times) for name, times in seconds.items()}, "milliseconds_a_step": {
            name: 1000 * median for name, median in medians.items()},
        "cached_over_none": medians["cached"] / medians["none"], "off_over_cached": medians["off"] / medians["cached"],
        "environment": environment(),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def fill(run: Run, parts: Parts, device: torch.device) -> dict[str, Any]:
    assert run.data.mean is not None
    assert run.data.std is not None
    request = CacheRequest(
        size=run.views.size, mean=run.data.mean, std=run.data.std, folder=run.data.cache, device=device,
        workers=run.data.workers,
    )  # fmt: skip
    return cache_representations(parts.source, parts.maker.representations, run.cache, request=request)


def epoch(run: Run, parts: Parts, makers: dict[str, BatchMaker], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step of one epoch, by maker."""
    method = parts.method.to(device).train()
    if run.engine.channels_last:
        method.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(method.parameter_groups(), run.optimizer, run.peak_lr)
    data = TrainingData(parts.source, parts.maker, batch_size=run.data.batch_size, seed=0, workers=run.data.workers)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number, loaded in enumerate(data.loader()):
        for name, maker in makers.items():
            started = now(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = method.loss(maker.to(device)(loaded, device), Step(number, 1000, 100))["loss"]
            loss.backward()
            optimizer.step()
            if number >= WARM_UP:
                seconds[name].append(now(device) - started)
    return seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="mvmr_cifar10_cpu")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
