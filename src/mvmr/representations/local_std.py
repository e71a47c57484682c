"""The local standard deviation, a map of texture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmr.representations.base import Representation, fixed
from mvmr.types import UserError


class LocalStd(Representation):
    """sqrt(var + 1e-8) over a box of size x size pixels, per colour channel (LSD in the MV-MR paper, Section 3.3).

    [B, C, H, W] to [B, C H W]; borders are reflected without repeating the edge. Raises UserError if `size` is even or
    less than 3, or if a side of the image is not larger than size // 2.
    """

    def __init__(self, *, size: int = 3):
        super().__init__()
        if size < 3 or size % 2 == 0:
            raise UserError(f"LocalStd needs an odd size of 3 or more; got size={size}.")
        self.size = size

    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        return self.maps(images).flatten(1)

    @fixed
    def maps(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        reach = self.size // 2
        height, width = images.shape[-2:]
        if min(height, width) <= reach:
            raise UserError(
                f"LocalStd with size={self.size} needs images of more than {reach} pixels a side, not "
                f"{height}x{width}: lower representations.local_std.size."
            )
        padded = F.pad(images, (reach,) * 4, mode="reflect")
        total, squares = torch.zeros_like(images), torch.zeros_like(images)
        # E[x^2] - E[x]^2 cancels where the image is flat and far from 0; differences to the box's centre do not.
        for row in range(self.size):
            for column in range(self.size):
                difference = padded[..., row : row + height, column : column + width] - images
                total.add_(difference)
                squares.addcmul_(difference, difference)
        count = self.size**2
        variance = squares.div_(count).sub_(total.div_(count).square_()).clamp_(min=0)
        return variance.add_(1e-8).sqrt_()
