"""The plain image itself."""

from __future__ import annotations

from torch import Tensor

from mvmr.representations.base import Representation, fixed


class Pixels(Representation):
    """The normalised pixels, flattened: [B, 3, H, W] to [B, 3 H W] ("raw image", MV-MR paper, Section 3.3)."""

    cheap = True

    @fixed
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        return images.flatten(1)
