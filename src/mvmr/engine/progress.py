"""The progress bar: images a second, loss terms and time left, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mvmr.engine.metrics import Metrics
from mvmr.engine.module import Adapter


@contextmanager
def counting(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress(what, done, total) for work before training (scanning, checking); total 0: not yet known."""
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    tasks: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total or None)

        yield progress


class ProgressBar(Callback):
    """One bar over all optimiser steps; a line an epoch where standard error is not a terminal."""

    def __init__(self, metrics: Metrics, *, quiet: bool = False):
        self.metrics = metrics
        self.console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        if not trainer.is_global_zero or not sys.stderr.isatty() or self.console.quiet:
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"), console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=pl_module.total_steps, completed=trainer.global_step, text="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._bar is not None:
            description = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._bar.update(
                self._task, completed=trainer.global_step, description=description, text=self._numbers(most=4)
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is None and trainer.is_global_zero:
            self.console.print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {self._numbers(most=12)}", highlight=False,
                soft_wrap=True,
            )  # fmt: skip

    def _numbers(self, *, most: int) -> str:
        latest = self.metrics.latest
        if not latest:
            return ""
        terms = [(key.removeprefix("train/"), value) for key, value in latest.items() if key.startswith("train/")]
        shown = "  ".join(f"{name} {value:.3f}" for name, value in terms[:most])
        return f"{latest['images_per_second']:.0f} images/s  {shown}"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
