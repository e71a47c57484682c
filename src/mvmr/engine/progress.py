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

BAR = 56
"""Characters that the bar, its counts and the time left take of a line."""


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
        columns = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=16), *columns, console=self.console)
        self._task = self._bar.add_task("training", total=pl_module.total_steps, completed=trainer.global_step, text="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._bar is not None:
            description = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._bar.update(
                self._task,
                completed=trainer.global_step,
                description=description,
                text=self._numbers(room=self.console.width - BAR),
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is None and trainer.is_global_zero:
            self.console.print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {self._numbers(room=400)}", highlight=False,
                soft_wrap=True,
            )  # fmt: skip

    def _numbers(self, *, room: int) -> str:
        """Images a second and as many terms as fit into `room` characters, the loss first."""
        latest = self.metrics.latest
        if not latest:
            return ""
        text = f"{latest['images_per_second']:.0f} images/s"
        for key, value in latest.items():
            term = f"  {key.removeprefix('train/')} {value:.3f}"
            if key.startswith("train/") and len(text) + len(term) <= room:
                text += term
        return text

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
