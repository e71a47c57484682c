"""A small encoder's card, and a network's weights and buffers, to be compared with what they are later."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvmr.nets.cards import EncoderCard
from mvmr.nets.encoders import EncoderConfig

CARD = EncoderCard(
    encoder=EncoderConfig(name="resnet18", stem="mvmr", width=0.0625), dim=32, image_size=16, mean=(0.3, 0.3, 0.3),
    std=(0.4, 0.4, 0.4), method="none", data="digits", version="0",
)  # fmt: skip


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
