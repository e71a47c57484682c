"""The smallest encoder that takes images of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pool(nn.Module):
    """[B, 3, H, W] -> [B, 5], and a note of every shape that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.given: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(tuple(images.shape))
        return torch.tanh(self.layer(images.mean((2, 3))))
