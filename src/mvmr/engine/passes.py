"""Passes over the whole un-augmented data set, for methods that label it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvmr.config import Run
from mvmr.data.batches import BatchMaker
from mvmr.data.loading import plain_batches
from mvmr.data.sources import ImageSource, subset
from mvmr.errors import UserError
from mvmr.ops.random import permutation

IMAGES = 512
"""At most so many images of all ranks together go into one call."""
LOOKED_UP = 8192
"""Rows that are looked up at a time."""


@dataclass(frozen=True)
class DataPass:
    """The engine's FeaturePass over this rank's images: every W-th of an order that the run's seed gives."""

    source: ImageSource
    run: Run
    maker: BatchMaker
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @torch.no_grad()
    def __call__(self, fn: Callable[[Tensor], Tensor], /) -> tuple[Tensor, Tensor]:
        """(index [n], features [n, D]) of fn, on the device that fn leaves them on; the index is on the CPU."""
        # Files lie sorted by class, and batch norm in train mode would remove what tells classes apart.
        own, sizes = self._shares(permutation(self.run.seed, 0, len(self.source)))
        return own, _rows(len(own), (fn(images) for _, images in self._images(own, sizes)))

    @torch.no_grad()
    def representation(self, name: str, /) -> tuple[Tensor, Tensor]:
        """(index [n] on the CPU, rows [n, F] float32 on the device), as batches have them.

        Raises UserError for a name that the run's representations do not have.
        """
        known = self.maker.representations
        if name not in known:
            raise UserError(f"representations: none is named {name!r}; there are {', '.join(known) or 'none at all'}")
        own, sizes = self._shares(torch.arange(len(self.source)))
        if name in self.maker.kept:
            kept = self.maker.kept[name]
            return own, _rows(len(own), (kept(part, self.device) for part in own.split(LOOKED_UP)))
        made = known[name].to(self.device)
        return own, _rows(len(own), (made(images, index, 0).flatten(1) for index, images in self._images(own, sizes)))

    def _shares(self, order: Tensor) -> tuple[Tensor, list[int]]:
        """This rank's positions, and how many of them each call has: parts of windows that all ranks have in common."""
        places = torch.arange(len(order))
        windows = places.tensor_split(-(-len(places) // IMAGES))
        of_this_rank = [int((window % self.world_size == self.rank).sum()) for window in windows]
        return order[self.rank :: self.world_size], of_this_rank

    def _images(self, own: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions [b], normalised plain images [b, 3, S, S] on the device)."""
        assert self.run.data.mean is not None
        assert self.run.data.std is not None
        mean, std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self.run.data.mean, self.run.data.std)
        )
        part, size = subset(self.source, own), self.run.views.size
        batches = plain_batches(part, batch_size=sizes, size=size, workers=self.run.data.workers)
        for within, images in batches:
            yield own[within], (images.to(self.device).float() / 255 - mean) / std


def _rows(count: int, parts: Iterable[Tensor]) -> Tensor:
    """All parts in one tensor that is there from the start: joining them at the end would need twice the memory."""
    rows, done = torch.empty(0), 0
    for part in parts:
        if not done:
            rows = part.new_empty(count, *part.shape[1:])
        rows[done : done + len(part)] = part
        done += len(part)
    return rows
