"""tune: the largest batch size that fits, and a learning rate from a range test, as numbers in a resolved recipe."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mvmr.config import Run
from mvmr.data.sources import Progress
from mvmr.engine import memory
from mvmr.engine.environment import environment
from mvmr.engine.progress import counting
from mvmr.engine.train import Parts, build
from mvmr.engine.trials import Trial, loss_by_rate, try_batch_size
from mvmr.errors import RunError, UserError
from mvmr.ops.files import write_bytes

SMALLEST = 2
"""Batch norm and distances need two images."""
CPU_START = 32
"""Below this a search on the CPU begins: memory is foreseen from smaller batches, never met by surprise."""
SHARE = 0.8
"""Of the memory that is available on the CPU, what a batch may be expected to take."""
RATES = 100
"""Optimiser steps of the range test."""
DECADES = {"adam": (-6, 0), "adamw": (-6, 0), "sgd": (-5, 1), "lars": (-4, 2)}
"""Powers of ten between which an optimiser's rates are tried; LARS's are multiplied by its small trust ratio."""
WINDOW = 7
"""Losses that are averaged into one."""
FALL = 0.8
"""Of the whole fall of the loss, what the suggested rate has behind it."""


@dataclass(frozen=True)
class Tuned:
    """A run with what was found in its place, and how it was found."""

    run: Run
    record: dict[str, Any]
    """{"recipe": name, "device": ..., "batch_size": {...}, "lr": {...}, "remarks": [...]}, ready for JSON."""


def tune(run: Run, *, batch_size: bool, lr: bool, max_batch_size: int | None = None, quiet: bool = False) -> Tuned:
    """Search a batch size, then a learning rate for it; nothing but the returned values is changed or written.

    Raises UserError for several devices or a limit that leaves no batch, RunError where no batch fits.
    """
    _check(run, max_batch_size)
    remarks: list[str] = []
    record: dict[str, Any] = {"recipe": run.name, "device": _device_name(run)}
    with _own_randomness(), counting(quiet=quiet) as progress:
        parts = build(run, progress=progress)
        if batch_size:
            record["batch_size"] = _search_batch_size(run, parts, max_batch_size, progress, quiet=quiet)
            run = _with(run, "data", batch_size=record["batch_size"]["found"])
        if lr:
            run, record["lr"] = _search_lr(run, parts, progress, may_shrink=batch_size, remarks=remarks, quiet=quiet)
    if batch_size:
        found, before = run.data.batch_size, record["batch_size"]["recipe"]
        record["batch_size"]["found"] = found
        if not lr and run.optimizer.lr != "auto" and found != before:
            remarks.append(
                f"optimizer.lr stays {run.optimizer.lr:g}, which the recipe gives for data.batch_size={before}, not "
                f"{found}; optimizer.lr=auto scales with the batch, and --lr searches a rate"
            )
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return Tuned(run, {**record, "remarks": remarks})


def save(tuned: Tuned, path: Path) -> Path:
    """Write the resolved recipe as YAML, which `mvmr train` accepts, and the record beside it as JSON; returns that."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {path}: the recipe is written as YAML; give a name that ends in .yaml")
    curves = path.with_suffix(".json")
    header = "\n".join(f"# {line}" for line in [*_explanation(tuned.record), f"curves: {curves.name}"])
    recipe = f"{header}\n{yaml.safe_dump(tuned.run.resolved(), sort_keys=False)}"
    for file, text in ((curves, json.dumps(tuned.record, indent=2) + "\n"), (path, recipe)):
        write_bytes(file, text.encode(), remedy="give another file with --out")
    return curves


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The first rate at which the averaged loss has fallen by four fifths of all that it falls before it rises again.

    The range test is Smith's (WACV 2017, section 3.3). Its usual reading, the rate of steepest fall, follows the noise
    where a loss falls slowly, as these do (docs/tune.md). The curve ends where the loss is above its start by what it
    had fallen. None where it falls by no more than twice the noise of single batches, or too few losses are there.
    """
    if len(losses) < 3 * WINDOW:
        return None
    values = np.asarray(losses, dtype=np.float64)
    weights = np.ones(WINDOW)
    smooth = np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")
    lowest_rates = values[: 2 * WINDOW]  # which change next to nothing
    start, margin = lowest_rates.mean(), max(2 * lowest_rates.std(), 1e-6 * abs(lowest_rates.mean()))
    fallen = start - np.minimum.accumulate(np.minimum(smooth, start))
    risen = np.flatnonzero(smooth > start + np.maximum(fallen, margin))
    before = fallen[: risen[0]] if len(risen) else fallen
    if not len(before) or before[-1] <= margin:
        return None
    return float(f"{rates[int(np.argmax(before >= FALL * before[-1]))]:.2g}")


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Every global generator is afterwards as it was, however the block ends."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _check(run: Run, max_batch_size: int | None) -> None:
    engine = run.engine
    gpus = torch.cuda.device_count() if engine.accelerator in ("auto", "gpu") and torch.cuda.is_available() else 0
    devices = engine.nodes * (max(1, gpus) if engine.devices == "auto" else engine.devices)
    if devices > 1:
        raise UserError(
            f"engine.devices={engine.devices} and engine.nodes={engine.nodes} are {devices} devices here, and tuning "
            "works on one: tune with engine.devices=1 engine.nodes=1, then train on N devices with N times "
            "data.batch_size (it counts the images of all devices together)"
        )
    if max_batch_size is not None and max_batch_size < SMALLEST:
        raise UserError(f"--max-batch-size {max_batch_size}: a batch needs {SMALLEST} images; give at least that")


def _search_batch_size(run: Run, parts: Parts, limit: int | None, progress: Progress, *, quiet: bool) -> dict[str, Any]:
    """Double from the recipe's size (on the CPU from a small one) to the last that fits, or halve until one does."""
    images, start = len(parts.source), run.data.batch_size
    top = images if limit is None else min(images, limit)
    on_cpu = not (torch.cuda.is_available() and run.engine.accelerator in ("auto", "gpu"))
    while start >= 2 * SMALLEST and (start > top or (on_cpu and start >= CPU_START)):
        start //= 2
    at_rest = memory.resident()
    trials: list[Trial] = []
    size, reason = start, ""
    while not reason:
        progress(f"batch size {size}", 0, 1)
        trials.append(try_batch_size(run, parts, size, quiet=quiet))
        progress(f"batch size {size}", 1, 1)
        working = [trial for trial in trials if trial.works]
        if not trials[-1].works:
            reason = f"{size} runs out of memory" if working else ""
            size //= 2
            if size < SMALLEST and not working:
                raise RunError(
                    f"no batch size fits into memory, not even {trials[-1].batch_size}: take a smaller encoder.name or "
                    "views.size, or engine.precision=bf16"
                )
        elif len(trials) > len(working):
            reason = f"{2 * size} runs out of memory"
        elif 2 * size > top:
            reason = f"the data has {images} images" if top == images else f"--max-batch-size is {limit}"
        elif on_cpu and _would_not_fit(working, at_rest):
            reason = f"{2 * size} is expected to take more than {SHARE:.0%} of the memory available"
        else:
            size *= 2
    found = max(trial.batch_size for trial in trials if trial.works)
    return {"found": found, "recipe": run.data.batch_size, "limit": reason, "trials": [asdict(t) for t in trials]}


def _would_not_fit(working: Sequence[Trial], at_rest: int | None) -> bool:
    """Whether twice the last size is expected to pass the share of memory; it grows at least as before, or doubles."""
    left, now = memory.available(), memory.resident()
    peaks = [trial.peak_bytes for trial in working]
    if left is None or now is None or at_rest is None or peaks[-1] is None:
        return False
    grown = max(0, peaks[-1] - at_rest)
    before = max(1, (peaks[-2] or 0) - at_rest) if len(peaks) > 1 else grown
    factor = min(4.0, max(2.0, grown / max(1, before)))  # the distances of a batch are square in its size
    return factor * grown > SHARE * (left + max(0, now - at_rest))


def _search_lr(
    run: Run, parts: Parts, progress: Progress, *, may_shrink: bool, remarks: list[str], quiet: bool
) -> tuple[Run, dict[str, Any]]:
    """The run with a rate from the range test, or with its own, and the curve."""
    rates = [float(f"{rate:.4g}") for rate in np.logspace(*DECADES[run.optimizer.name], RATES)]
    while True:
        size = run.data.batch_size
        losses = loss_by_rate(run, parts, rates, lambda step: progress("learning rate", step, RATES), quiet=quiet)
        if losses is not None:
            break
        if not may_shrink or size // 2 < SMALLEST:
            raise RunError(
                f"data.batch_size={size} runs out of memory: search it too (--batch-size), or make it smaller"
            )
        remarks.append(f"data.batch_size={size} ran out of memory in the range test of the rate: half of it is taken")
        run = _with(run, "data", batch_size=size // 2)
    kept = "auto" if run.optimizer.lr == "auto" else f"{run.optimizer.lr:g}"
    found = suggest(rates, losses)
    if not type(parts.method).loss_is_progress:
        found = None
        remarks.append(
            f"the loss of {run.method.name} is no measure of progress, so no rate can be found by it: "
            f"optimizer.lr stays {kept}"
        )
    elif found is None:
        remarks.append(f"the loss fell at no rate by more than its noise: optimizer.lr stays {kept}")
    record = {
        "found": found, "recipe": run.optimizer.lr, "peak_of_recipe": run.peak_lr, "batch_size": run.data.batch_size,
        "rates": rates[: len(losses)], "losses": losses, "finite_to_the_end": len(losses) == len(rates),
    }  # fmt: skip
    return (run if found is None else _with(run, "optimizer", lr=found)), record


def _with(run: Run, section: str, **changes: Any) -> Run:
    return run.model_copy(update={section: getattr(run, section).model_copy(update=changes)})


def _device_name(run: Run) -> str:
    known = environment()
    gpu = known["gpus"] and run.engine.accelerator in ("auto", "gpu")
    return known["gpus"][0] if gpu else f"{known['processor']}, {known['threads']} threads"


def _explanation(record: dict[str, Any]) -> list[str]:
    lines = [f"{record['recipe']} as tuned on {record['device']}"]
    if "batch_size" in record:
        batch = record["batch_size"]
        lines.append(f"data.batch_size: {batch['found']} fits ({batch['limit']}); the recipe had {batch['recipe']}")
    if "lr" in record:
        lr = record["lr"]
        had = f"{lr['recipe']} = {lr['peak_of_recipe']:g}" if lr["recipe"] == "auto" else f"{lr['recipe']:g}"
        where = (
            "not found, the recipe's is kept"
            if lr["found"] is None
            else f"{lr['found']:g}, where four fifths of the fall of the loss were reached"
        )
        lines.append(
            f"optimizer.lr: {where}, in {len(lr['rates'])} steps of rising rate at a batch of {lr['batch_size']}"
        )
        lines.append(f"  (the recipe had {had})")
    return [*lines, *record["remarks"]]
