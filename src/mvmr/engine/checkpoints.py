"""Checkpoints that a killed run never leaves broken."""

from __future__ import annotations

import os
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError

from mvmr.engine.module import Adapter
from mvmr.errors import RunError
from mvmr.nets.weights import EncoderCard, save_encoder

LAST = "last.ckpt"
FOLDER = "checkpoints"
"""In the run folder."""


class Checkpoints(Callback):
    """Writes last.ckpt at epoch ends and every `every_steps` optimiser steps, beside and then into place.

    Every `keep_every_epochs` epochs it keeps epoch-NNNN.ckpt, and the encoder as it is then as epoch-NNNN.safetensors.
    """

    def __init__(self, folder: Path, card: EncoderCard, *, every_steps: int | None, keep_every_epochs: int | None):
        self.folder, self.card = folder, card
        self.every_steps, self.keep_every_epochs = every_steps, keep_every_epochs
        self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Or a resumed run would save in the middle of its first accumulated step.
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_steps and step > self._saved and step % self.every_steps == 0:
            assert isinstance(pl_module, Adapter)
            pl_module.check_finite()  # between two log steps nothing else has looked
            self._save(trainer, LAST)
            self._saved = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, LAST)
        done = trainer.current_epoch + 1
        if self.keep_every_epochs and done % self.keep_every_epochs == 0:
            self._save(trainer, f"epoch-{done:04d}.ckpt")
            if trainer.is_global_zero:
                assert isinstance(pl_module, Adapter)
                self._save_encoder(pl_module, self.folder / f"epoch-{done:04d}.safetensors")

    def _save_encoder(self, adapter: Adapter, path: Path) -> None:
        """What `mvmr evaluate` and `mvmr rank` read: the checkpoint itself is for resuming alone."""
        try:
            save_encoder(path, adapter.method.exported(), self.card)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{path}: cannot be written ({error}); make room on the disk, then continue with --resume"
            ) from None

    def _save(self, trainer: Trainer, name: str) -> None:
        path, beside = self.folder / name, self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(beside)  # all ranks take part, the first one writes
            if trainer.is_global_zero:
                with open(beside, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise RunError(
                f"{path}: cannot be written ({error.strerror or error}). The checkpoint before it is intact: "
                "make room on the disk, then continue with --resume"
            ) from None
