"""Random crops of images with label maps, each a pure function of (seed, position)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.data.segmentation import IGNORED, SegmentationSource, SegmentedImage
from mvmr.data.view_ops import resize
from mvmr.ops.random import permutation, uniform

STREAM = 0xFFFFFFD1
"""Random stream, far from those of other views."""
KEPT = 512 * 2**20
"""Bytes of decoded images that are kept in the memory of a process."""


@dataclass(frozen=True)
class CropSettings:
    """How a crop is made of an image and its label map."""

    size: int
    """Side of the crop."""
    scale: tuple[float, float]
    """Range of the factor by which an image is resized before."""
    flip: bool
    """Mirror every second one."""
    fill: tuple[int, int, int]
    """The colour beyond an image's borders, where labels are ignored."""
    short_side: int | None = None
    """Shorter side to which an image is resized first; None: as it is."""


class SegmentationViews:
    """Crops by position: epoch p // N of the source's N images, in an order of its own, without end."""

    def __init__(self, source: SegmentationSource, settings: CropSettings, *, seed: int):
        self.source, self.settings, self.seed = source, settings, seed
        self._order: tuple[int, Tensor] = -1, torch.empty(0)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def batch(self, positions: range) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] uint8 and labels [B, S, S] int64 at some positions."""
        crops = [self.crop(position) for position in positions]
        return torch.stack([image for image, _ in crops]), torch.stack([labels for _, labels in crops]).long()

    def crop(self, position: int) -> tuple[Tensor, Tensor]:
        """Image [3, S, S] and labels [S, S], both uint8, at one position."""
        epoch, place = divmod(position, len(self.source))
        if self._order[0] != epoch:
            self._order = epoch, permutation(self.seed, epoch, len(self.source))
        index = int(self._order[1][place])
        drawn = uniform(self.seed, epoch, torch.tensor([index]), STREAM, 4)[0].tolist()
        return cut(*self._image(index), self.settings, drawn)

    def _image(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._kept:
            image, labels = shortened(self.source[index], self.settings.short_side)
            # Its own memory, labels included: files are decoded, and outlines painted, once where there is room.
            size = image.numel() + labels.numel()
            if self._bytes + size > KEPT:
                return image, labels
            self._bytes += size
            self._kept[index] = image, labels
        return self._kept[index]


def shortened(segmented: SegmentedImage, short_side: int | None) -> tuple[Tensor, Tensor]:
    """Image [3, h, w] uint8 and labels [h, w] uint8 with h or w resized to `short_side`; None: as they are."""
    image, labels = segmented.image, segmented.labels.to(torch.uint8)
    if short_side is None:
        return image, labels
    height, width = image.shape[1:]
    return _resized(image, labels, short_side / min(height, width))


def cut(image: Tensor, labels: Tensor, settings: CropSettings, drawn: list[float]) -> tuple[Tensor, Tensor]:
    """A crop of an image [3, h, w] and its labels [h, w], both uint8, by four numbers in (0, 1).

    They choose the scale, uniformly; the crop's upper and left edge, among all places where the crop lies in the image,
    or the image in the crop; and mirroring.
    """
    low, high = settings.scale
    image, labels = _resized(image, labels, low + (high - low) * drawn[0])
    size = settings.size
    out = torch.empty(3, size, size, dtype=torch.uint8)
    out[:] = torch.tensor(settings.fill, dtype=torch.uint8)[:, None, None]
    out_labels = torch.full((size, size), IGNORED, dtype=torch.uint8)
    (to_y, from_y), (to_x, from_x) = (
        _overlap(length, size, draw) for length, draw in zip(labels.shape, drawn[1:3], strict=True)
    )
    out[:, to_y, to_x] = image[:, from_y, from_x]
    out_labels[to_y, to_x] = labels[from_y, from_x]
    if settings.flip and drawn[3] < 0.5:
        out, out_labels = out.flip(-1), out_labels.flip(-1)
    return out, out_labels


def _overlap(length: int, size: int, draw: float) -> tuple[slice, slice]:
    """Where an image's axis lies in the crop, and which part of the image that is."""
    choices = abs(length - size) + 1
    offset = min(int(draw * choices), choices - 1)
    common = min(length, size)
    here, there = slice(0, common), slice(offset, offset + common)
    return (here, there) if length >= size else (there, here)


def _resized(image: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    height, width = labels.shape
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if size == (height, width):
        return image, labels
    nearest = functional.interpolate(labels[None, None], size=size, mode="nearest-exact")[0, 0]
    return resize(image, size), nearest
