"""What is known of an encoder's weights, and the encoder that takes images as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mvmr.nets.encoders import EncoderConfig
from mvmr.types import Section

Made = TypeVar("Made")


class EncoderCard(Section):
    """What has to be known to use an encoder's weights."""

    encoder: EncoderConfig
    """The architecture."""
    dim: int = Field(ge=1)
    """Width of its features."""
    image_size: int = Field(ge=1)
    """Side of the images that it was trained on."""
    mean: tuple[float, ...] = Field(min_length=3, max_length=3)
    """Channel means taken from images in [0, 1]."""
    std: tuple[float, ...] = Field(min_length=3, max_length=3)
    """Channel deviations that they are then divided by."""
    method: str
    """What trained it."""
    data: str
    """What it was trained on."""
    version: str
    """Version of mvmr, or of the library that the weights are from."""


class Encoder(nn.Module):
    """A backbone that takes images as they are: uint8 [B, 3, H, W] or float in [0, 1] -> features [B, D] float32.

    Normalises with the card's mean and std; resizing to `card.image_size` is the caller's work. Raises ValueError for
    images of other shapes or types.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, card: EncoderCard):
        super().__init__()
        self.backbone = backbone
        self.card = card
        # Not in the state_dict: the card is their one home.
        self.register_buffer("mean", torch.tensor(card.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are [B, 3, H, W]; these are {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise ValueError(f"images are uint8, or float in [0, 1]; these are {images.dtype}")
        return self.normalised((images - self.mean) / self.std)

    def normalised(self, images: Tensor) -> Tensor:
        """Features [B, D] float32 of images [B, 3, H, W] that are normalised already."""
        weight = next(self.backbone.parameters(), images)
        return self.backbone(images.to(weight.dtype)).float()  # [B, D]


def seeded(build: Callable[[], Made], *, seed: int) -> Made:
    """build() under a seed of its own; the global generator is put back."""
    # Weights are drawn on the CPU: its generator alone is set.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()
