"""metrics.jsonl and TensorBoard: one object a line, and nothing lost or doubled by a restart."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from mvmr.engine.module import Adapter
from mvmr.errors import RunError, UserError
from mvmr.ops.files import write_bytes


class MetricsFile:
    """Appends records to metrics.jsonl and, where asked, to TensorBoard."""

    def __init__(self, folder: Path, *, tensorboard: bool | str):
        self.path = folder / "metrics.jsonl"
        installed = importlib.util.find_spec("tensorboard") is not None
        if tensorboard is True and not installed:
            raise UserError("engine.tensorboard is true, but TensorBoard is not installed: pip install 'mvmr[report]'")
        self._tensorboard_folder = folder / "tensorboard" if tensorboard and installed else None
        self._writer: Any = None

    def keep_until(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        lines = "".join(f"{line}\n" for line in kept)
        write_bytes(self.path, lines.encode(), remedy="make room on the disk, then continue with --resume")

    def write(self, record: Mapping[str, float]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({key: _short(value) for key, value in record.items()}) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}). The last checkpoint is intact: "
                "make room on the disk, then continue with --resume"
            ) from None
        self._to_tensorboard(record)

    def _to_tensorboard(self, record: Mapping[str, float]) -> None:
        if self._tensorboard_folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events after the resumed step are hidden by TensorBoard itself.
            self._writer = SummaryWriter(str(self._tensorboard_folder), purge_step=int(record["step"]))
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(record["step"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Metrics(Callback):
    """Logs the mean of every term over each interval of steps, with speed and learning rate."""

    def __init__(self, file: MetricsFile, *, every_steps: int, batch_size: int):
        self.file, self.every_steps, self.batch_size = file, every_steps, batch_size
        self.latest: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        self._started = self._since = 0.0
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = trainer.global_step
        self._started = self._since = time.monotonic()
        if trainer.is_global_zero:
            self.file.keep_until(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Adapter)
        for name, value in pl_module.terms.items():
            # Summed on the device: reading a value here would wait for the GPU at every step.
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
        self._batches += 1
        step = trainer.global_step
        if step > self._logged and step % self.every_steps == 0:
            pl_module.check_finite()
            self._log(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Adapter)
        if self._batches:
            pl_module.check_finite()
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        now = time.monotonic()
        means = {name: total / self._batches for name, total in self._sums.items()}
        if trainer.world_size > 1:  # of losses that are of this rank's part; those of the whole batch are equal anyway
            means = {name: trainer.strategy.reduce(mean, reduce_op="mean") for name, mean in sorted(means.items())}
        self.latest = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "seconds": now - self._started,
            "images_per_second": self._batches * self.batch_size / max(now - self._since, 1e-9),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **{f"train/{name}": mean.item() for name, mean in means.items()},
        }
        self._sums, self._batches, self._since, self._logged = {}, 0, now, trainer.global_step
        if trainer.is_global_zero:
            self.file.write(self.latest)

    def pause(self) -> None:
        """Restart the clock of the speed: what came since was not training."""
        self._since = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return float("inf")


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
