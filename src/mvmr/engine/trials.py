"""Short fits on a copy of a run's networks, which leave no trace: what the two searches of `tune` are made of."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from mvmr.config import Run
from mvmr.data.module import TrainingData
from mvmr.engine.memory import PeakMemory, is_out_of_memory
from mvmr.engine.module import Adapter
from mvmr.engine.train import NOISE, Parts, keep_representations, trainer_of
from mvmr.errors import RunError

STEPS = 3
"""Optimiser steps of a trial of a batch size: from the second on, the optimiser's state is there as well."""


@dataclass(frozen=True)
class Trial:
    """One batch size and what came of it."""

    batch_size: int
    works: bool
    peak_bytes: int | None
    """Of the GPU's memory, else of the process; None where out of memory or unknown."""
    images_per_second: float | None
    """Without the first step; None where out of memory."""


def try_batch_size(run: Run, parts: Parts, size: int, *, quiet: bool = False) -> Trial:
    """A few steps at one batch size; out of memory is a result. Other errors are raised."""
    watch = _Steps()
    changes = {
        "data": run.data.model_copy(update={"batch_size": size}),
        # Memory does not depend on the rate, and a rate for another batch size must not make the loss overflow.
        "optimizer": run.optimizer.model_copy(update={"lr": 1e-12}),
        "schedule": run.schedule.model_copy(update={"epochs": max(run.schedule.epochs, STEPS)}),
    }
    try:
        works = _fits(run.model_copy(update=changes), parts, watch, quiet=quiet)
    finally:
        peak = watch.memory.stop()
    _release()
    return Trial(size, works, peak if works else None, watch.speed(size) if works else None)


def loss_by_rate(
    run: Run, parts: Parts, rates: Sequence[float], progress: Callable[[int], None], *, quiet: bool = False
) -> list[float] | None:
    """The loss met at each of the rates, one optimiser step each; ends where it is not finite. None: out of memory."""
    test = _RangeTest(rates, run.peak_lr, progress)
    steps_per_epoch = max(1, len(parts.source) // run.data.batch_size // run.engine.accumulate)
    epochs = max(run.schedule.epochs, -(-len(rates) // steps_per_epoch))
    longer = run.model_copy(update={"schedule": run.schedule.model_copy(update={"epochs": epochs})})
    works = _fits(longer, parts, test, quiet=quiet)
    _release()
    return test.losses if works else None


def _fits(run: Run, parts: Parts, callback: _Trial, *, quiet: bool) -> bool:
    """Train until the callback ends it; False where memory ran out."""
    try:
        _fit(run, parts, callback, quiet=quiet)
    except RunError:
        if not callback.diverged():
            raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False  # leaving this block frees what the error's frames hold
    return True


def _fit(run: Run, parts: Parts, callback: _Trial, *, quiet: bool) -> None:
    # Lightning's own finders are not used. They train the module itself and restore it from a checkpoint that they
    # write into the working directory; their rate test gives all parameter groups one rate, which undoes layer decay;
    # their batch-size search changes neither the adapter's steps an epoch nor looks at memory before it is gone.
    # A fresh trainer over a copy needs no restoring.
    parts = replace(parts, method=copy.deepcopy(parts.method))
    data = TrainingData(
        parts.source, parts.maker, batch_size=run.data.batch_size, seed=run.seed, workers=run.data.workers
    )
    steps_per_epoch = -(-len(data.loader()) // run.engine.accumulate)
    adapter = Adapter(parts.method, run, steps_per_epoch=steps_per_epoch, source=parts.source, maker=parts.maker)
    trainer = trainer_of(run, [callback])
    data.weights = adapter.sampling_weights
    data.prepare = partial(keep_representations, run, parts, trainer, quiet=quiet)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.", message="|".join(NOISE))
        try:
            trainer.fit(adapter, datamodule=data)
        except SystemExit:  # how Lightning ends a fit that was interrupted from the keyboard
            if not trainer.interrupted:
                raise
            raise RunError("interrupted while tuning; nothing was written") from None


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Trial(Callback):
    """Ends a fit after so many optimiser steps."""

    def __init__(self, steps: int):
        self.steps = steps
        self._adapter: Adapter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        self._adapter = pl_module

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True

    def diverged(self) -> bool:
        """Whether the last terms are not finite, so that an error about them is what ended the fit."""
        terms = self._adapter.terms.values() if self._adapter else ()
        return any(not torch.isfinite(value).all() for value in terms)


class _Steps(_Trial):
    """Measures memory and speed of a few steps."""

    def __init__(self) -> None:
        super().__init__(STEPS)
        self.memory = PeakMemory()
        self._times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.memory.start(pl_module.device)  # from here on: filling the cache of representations is no part of a step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._times.append(time.monotonic())

    def speed(self, size: int) -> float | None:
        """Images a second after the first batch."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) * size / max(self._times[-1] - self._times[0], 1e-9)


class _RangeTest(_Trial):
    """Gives every optimiser step the next rate, each group in its own proportion, and notes the loss."""

    def __init__(self, rates: Sequence[float], peak: float, progress: Callable[[int], None]):
        super().__init__(len(rates))
        self.rates, self.peak, self.progress = rates, peak, progress
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The schedule has just set its own rate: this comes after it and before the optimiser's step.
        rate = self.rates[min(trainer.global_step, len(self.rates) - 1)]
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["initial_lr"] / self.peak

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.diverged():  # where the adapter itself looks at log steps only
            trainer.should_stop = True
        elif len(self.losses) < trainer.global_step:  # once an optimiser step
            self.losses.append(pl_module.terms["loss"].item())
            self.progress(len(self.losses))
