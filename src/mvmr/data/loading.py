"""Batches of images in an order that is a function of (seed, epoch): resumable, and sharded over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvmr.data.decode import UnreadableImage
from mvmr.data.images import ArraySource, ImageSource
from mvmr.data.view_ops import plain
from mvmr.data.workers import in_workers
from mvmr.errors import RunError, UserError
from mvmr.ops.random import permutation, uniform

Start = Callable[[Tensor, int, int], dict[str, Tensor]]
"""start(image [3, H, W] uint8, number as in Loaded.drawn, epoch) -> crops {name: [3, s, s] uint8}: workers' part."""

POSITION = 0xFFFFFFFF
"""The bits of `Loaded.drawn` that say which image it is."""
WEIGHTED_STREAM = 0xFFFFFFFE
"""The stream of `weighted_draw`; the streams of views are small numbers, that of `permutation` is the last."""


@dataclass(frozen=True)
class Loaded:
    """One rank's part of a batch, before views are made."""

    index: Tensor
    """[B] int64 on the CPU, positions in the source."""
    drawn: Tensor
    """[B] int64 on the CPU, whose views they get: the position, and 2^32 more for each earlier time in the epoch."""
    epoch: int
    images: Tensor | dict[str, Tensor]
    """[B, 3, H, W] uint8, or crops by name, each [B, 3, s, s] uint8."""


@dataclass(frozen=True)
class _Read:
    drawn: Tensor
    images: Tensor | dict[str, Tensor]
    bad: list[tuple[str, str]]
    """(path, reason) of files that were replaced by the next readable one."""


class Loader:
    """Batches of an epoch after another; what comes next is a function of (seed, epoch, batches handed out).

    Batch t of an epoch holds images order[t * batch_size : (t + 1) * batch_size], and each rank gets its contiguous
    part of it, so that the parts of all ranks in turn are the batch of a single process. A remainder is dropped. An
    epoch ends by itself: the next iteration is the next epoch. An iteration given up half-way starts its epoch again.

    workers: processes that read files or a mapped array; they change no result. start: see `Start`, for files.
    weights: read when an epoch starts; [N] draws N images with replacement in proportion, None takes each once.
    Raises UserError for a batch_size that is larger than the data or not a multiple of world_size.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start: Start | None = None,
        weights: Callable[[], Tensor | None] | None = None,
    ):
        if len(source) < batch_size:
            raise UserError(
                f"data.batch_size is {batch_size}, but {source.name} has {len(source)} images to train on; "
                f"set data.batch_size={len(source)} or less"
            )
        if batch_size % world_size:
            raise UserError(f"data.batch_size is {batch_size}; it must be a multiple of the {world_size} devices")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.start, self.weights = start, weights
        self.epoch = 0
        self._handed_out = 0  # in this epoch
        self._resume_at = 0  # where the next iteration starts
        self._reported: set[str] = set()

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.source) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; a position inside the same epoch, from load_state_dict, is kept."""
        if epoch != self.epoch:
            self.epoch, self._handed_out, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch handed out; after an epoch's last, the start of the next epoch."""
        return {"epoch": self.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position: the next iteration starts there."""
        if not 0 <= state["batches"] < len(self):
            raise UserError(
                f"the run to resume stopped at batch {state['batches']} of an epoch, which now has {len(self)}: "
                "resume with the same data and data.batch_size"
            )
        self.epoch = state["epoch"]
        self._handed_out = self._resume_at = state["batches"]

    def __iter__(self) -> Iterator[Loaded]:
        # A generator, so that nothing is decided and no worker started before the first batch is asked for: whoever
        # drives the loader may call iter() first and set the position afterwards.
        first, self._resume_at = self._resume_at, 0
        epoch, self._handed_out = self.epoch, first
        parts = self._parts(epoch)[first:]
        workers = 0 if isinstance(self.source, ArraySource) and not self.source.is_mapped else self.workers
        for read in in_workers(partial(_read, self.source, self.start, epoch), parts, workers=workers):
            self._report(read.bad)
            self._handed_out += 1
            if self._handed_out == len(self):
                self.epoch, self._handed_out = epoch + 1, 0
            yield Loaded(read.drawn & POSITION, read.drawn, epoch, read.images)

    def _parts(self, epoch: int) -> list[Tensor]:
        """This rank's [B / W] for every batch of an epoch, as `Loaded.drawn`."""
        weights = self.weights() if self.weights else None
        images = len(self.source)
        order = permutation(self.seed, epoch, images) if weights is None else self._drawn(weights, epoch)
        return [
            batch.chunk(self.world_size)[self.rank]
            for batch in order[: len(self) * self.batch_size].split(self.batch_size)
        ]

    def _drawn(self, weights: Tensor, epoch: int) -> Tensor:
        if weights.shape != (len(self.source),):
            raise ValueError(f"weights must be [{len(self.source)}], one an image, not {list(weights.shape)}")
        order = weighted_draw(self.seed, epoch, weights)
        return order + (times_before(order) << 32)  # or an image that comes again would bring the same views

    def _report(self, bad: list[tuple[str, str]]) -> None:
        for path, reason in bad:
            if path not in self._reported:
                self._reported.add(path)
                warnings.warn(f"{path} cannot be read ({reason}); the next image takes its place", stacklevel=3)


def weighted_draw(seed: int, epoch: int, weights: Tensor) -> Tensor:
    """N positions drawn with replacement in proportion to weights [N]: [N] int64, a pure function of its arguments."""
    weights = weights.detach().to(device="cpu", dtype=torch.float64)
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError("weights must be finite and not negative, and some must be above 0")
    cumulated = weights.cumsum(0)
    drawn = uniform(seed, epoch, torch.arange(len(weights)), WEIGHTED_STREAM, 1)[:, 0] * cumulated[-1]
    last = int(weights.nonzero()[-1])  # rounding must not lead behind it
    return torch.searchsorted(cumulated, drawn, right=True).clamp_(max=last)


def times_before(order: Tensor) -> Tensor:
    """How often each of these positions [N] has come before in the list: [N] int64, 0 the first time."""
    ranked, places = order.sort(stable=True)
    times = torch.empty_like(order)
    times[places] = torch.arange(len(order)) - torch.searchsorted(ranked, ranked)
    return times


def _read(source: ImageSource, start: Start | None, epoch: int, drawn: Tensor) -> _Read:
    """The images of `drawn` [B], see Loaded, or what `start` makes of each."""
    index = drawn & POSITION
    if isinstance(source, ArraySource):
        return _Read(drawn, source.gather(index), [])
    bad: list[tuple[str, str]] = []
    found = [_next_readable(source, position, bad) for position in index.tolist()]
    images = [image for _, image in found]
    drawn = drawn - index + torch.tensor([position for position, _ in found])
    if start is None:
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"{source.name}: images differ in size, so the loader needs `start` to crop them")
        return _Read(drawn, torch.stack(images), bad)
    crops = [start(image, number, epoch) for number, image in zip(drawn.tolist(), images, strict=True)]
    return _Read(drawn, {name: torch.stack([crop[name] for crop in crops]) for name in crops[0]}, bad)


def _next_readable(source: ImageSource, position: int, bad: list[tuple[str, str]]) -> tuple[int, Tensor]:
    """The image at a position or the first readable one after it, with its position."""
    for step in range(len(source)):
        try:
            return (position + step) % len(source), source.read((position + step) % len(source))
        except UnreadableImage as error:
            bad.append((error.path, error.reason))
    raise RunError(f"{source.name}: no file can be read any more, first {bad[0][0]} ({bad[0][1]})")


def plain_batches(
    source: ImageSource, *, batch_size: int | list[int], size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(index [b] int64, images [b, 3, size, size] uint8) over the whole source in order, without augmentation.

    batch_size: of all batches, or of each one. Images are brought to `size` as in the plain view. Raises RunError where
    a file that was readable no longer is.
    """
    parts: list[Any] = [part for part in torch.arange(len(source)).split(batch_size) if len(part)]
    resident = isinstance(source, ArraySource) and not source.is_mapped
    made = in_workers(partial(_plain, source, size), parts, workers=0 if resident else workers)
    yield from zip(parts, made, strict=True)


def _plain(source: ImageSource, size: int, index: Tensor) -> Tensor:
    if isinstance(source, ArraySource):
        return plain(source.gather(index), size)
    try:
        return torch.stack([plain(source.read(position), size) for position in index.tolist()])
    except UnreadableImage as error:
        raise RunError(f"{error}: it was readable before; restore it, or run again to leave it out") from None
