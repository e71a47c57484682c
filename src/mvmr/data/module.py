"""The data module that hands batches to Lightning; nothing else here knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from mvmr.data.batches import BatchMaker
from mvmr.data.loading import Loaded, Loader
from mvmr.data.sources import ArraySource, ImageSource
from mvmr.errors import UserError
from mvmr.types import Batch

SHARE = 0.25
"""Of a GPU's free memory, what a data set may take of it: the rest is for the networks."""


class TrainingData(LightningDataModule):
    """Resumable, rank-sharded training batches; views and representations are made after the transfer."""

    def __init__(self, source: ImageSource, maker: BatchMaker, *, batch_size: int, seed: int, workers: int):
        super().__init__()
        self.source, self.maker = source, maker
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.weights: Callable[[], Tensor | None] | None = None
        """Called when an epoch starts; the engine sets it, so that relabelling comes before sampling."""
        self.prepare: Callable[[], None] | None = None
        """Called once the ranks have met and before the first batch; the engine sets it, to fill the cache."""
        self._loader: Loader | None = None
        self._resumed: dict[str, int] | None = None

    def loader(self, rank: int = 0, world_size: int = 1) -> Loader:
        start = None if isinstance(self.source, ArraySource) else self.maker.views.start
        return Loader(
            self.source, batch_size=self.batch_size, seed=self.seed, rank=rank, world_size=world_size,
            workers=self.workers, start=start, weights=self.weights,
        )  # fmt: skip

    def setup(self, stage: Any) -> None:
        if self.prepare is not None:
            self.prepare()

    def train_dataloader(self) -> Loader:
        assert self.trainer is not None
        self.source = on_device_if_it_fits(self.source, self.trainer.strategy.root_device)
        self._loader = self.loader(self.trainer.global_rank, self.trainer.world_size)
        if self._resumed is not None:
            self._loader.load_state_dict(self._resumed)
        return self._loader

    # The position is kept here as well as by Lightning, which forgets it when a checkpoint was made at an epoch's end.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._loader is None else {**self._loader.state_dict(), "images": len(self.source)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and state_dict["images"] != len(self.source):
            raise UserError(
                f"the run was started on {state_dict['images']} images, and {self.source.name} now has "
                f"{len(self.source)}: bring back the images it had, or start anew with --out"
            )
        self._resumed = state_dict or None

    def transfer_batch_to_device(self, batch: Loaded, device: torch.device, dataloader_idx: int) -> Batch:
        return self.maker.to(device)(batch, device)

    def teardown(self, stage: Any) -> None:
        self.weights = self.prepare = None


def on_device_if_it_fits(source: ImageSource, device: torch.device) -> ImageSource:
    """A source held in memory, on the GPU where there is one with room: its batches then need no copy."""
    if device.type != "cuda" or not isinstance(source, ArraySource) or source.is_mapped:
        return source
    free, _ = torch.cuda.mem_get_info(device)
    return source.to(device) if source.images.nbytes < SHARE * free else source
