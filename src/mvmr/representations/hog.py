"""Histograms of oriented gradients (Dalal and Triggs 2005), per colour channel and without block normalisation."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmr.representations.base import Representation, fixed
from mvmr.types import UserError


class HOG(Representation):
    """Per cell and colour channel, the mean over pixels of a histogram of unsigned gradient orientation.

    [B, C, H, W] to [B, C * bins * (H // cell) * (W // cell)]; rows and columns beyond the last whole cell are left out.
    Gradients are Sobel's with zeros around the image. A pixel of orientation p (in bins) gives to the bins around p:
    `correct`: its magnitude, shared by linear interpolation, so that the bins of a pixel sum to its magnitude;
    `official`: as the released MV-MR code does, magnitude m to the bin below and 1 - m to the bin above, so that the
    bins of a pixel sum to 1 and may be negative.
    Raises UserError for settings out of range, or if the image is smaller than a cell.
    """

    def __init__(self, *, bins: int = 24, cell: int = 8, variant: Literal["correct", "official"] = "correct"):
        super().__init__()
        if bins < 2 or cell < 1 or variant not in ("correct", "official"):
            got = f"bins={bins}, cell={cell}, variant={variant}"
            raise UserError(f"HOG needs bins >= 2, cell >= 1 and variant correct or official; got {got}.")
        self.bins, self.cell, self.variant = bins, cell, variant

    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        return self.maps(images).flatten(1)

    @fixed
    def maps(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, bins, H // cell, W // cell]."""
        if min(images.shape[-2:]) < self.cell:
            raise UserError(
                f"HOG with cells of {self.cell} pixels needs images of at least that size, not "
                f"{images.shape[-2]}x{images.shape[-1]}: lower representations.hog.cell."
            )
        across, down = sobel(images)  # [B, C, H, W] each
        magnitude = (across.square() + down.square()).sqrt()
        # Half a turn is `bins` bins. A pixel that is not a number must not become a bin out of range.
        orientation = torch.atan2(across, down).nan_to_num_(0) * (self.bins / math.pi)
        share = orientation - orientation.floor() if self.variant == "correct" else None
        weight_above = 1 - magnitude if share is None else magnitude * share
        weight_below = magnitude if share is None else magnitude - weight_above
        below, above = (p.remainder_(self.bins).long() for p in (orientation.floor(), orientation.ceil()))
        given = [(self._cells(below), self._cells(weight_below)), (self._cells(above), self._cells(weight_above))]
        histograms = images.new_zeros(*given[0][0].shape[1:-1], self.bins)  # [B, C, h, w, bins]
        # Pixel by pixel of the cells: no bin is then written twice at once, so the order of the sum is fixed.
        for number in range(self.cell**2):
            for bins, weights in given:
                histograms.scatter_add_(-1, bins[number], weights[number])
        return histograms.div_(self.cell**2).movedim(-1, 2)

    def _cells(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] to the pixels of the whole cells, [cell^2, B, C, H // cell, W // cell, 1]."""
        rows, columns = (side // self.cell for side in pixels.shape[-2:])
        whole = pixels[..., : rows * self.cell, : columns * self.cell]
        parts = whole.unflatten(-1, (columns, self.cell)).unflatten(-3, (rows, self.cell))  # [B, C, h, cell, w, cell]
        return parts.permute(3, 5, 0, 1, 2, 4).flatten(0, 1).unsqueeze(-1).contiguous()


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Left minus right, and upper minus lower, neighbours, weighted 1, 2, 1: [B, C, H, W] to twice [B, C, H, W].

    Written as sums of shifted images: a convolution may run in TF32 on a graphics card.
    """
    padded = F.pad(images, (1, 1, 1, 1))
    columns = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]  # [B, C, H, W + 2]
    rows = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]  # [B, C, H + 2, W]
    return columns[..., :-2] - columns[..., 2:], rows[..., :-2, :] - rows[..., 2:, :]
