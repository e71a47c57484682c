"""Images in clear groups, a small encoder, and a pass over them, for the tests of methods that cluster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mvmr.types import Batch, Step

IMAGES = 60
FIRST, SECOND = Step(0, 40, 10), Step(10, 40, 10)
"""The first steps of two epochs."""


def images(*, seed: int = 0, groups: int = 5) -> Tensor:
    """[IMAGES, 3, 4, 4] float64: image n belongs to group n % groups."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, 3, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(IMAGES, 3, 4, 4, generator=generator, dtype=torch.float64)
    return centres[torch.arange(IMAGES) % groups] + 0.1 * noise


def encoder(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.BatchNorm1d(width)).double()


class Pass:
    """The engine's pass over the images, in parts, of one rank of several; notes whether the encoder was training."""

    def __init__(self, net: nn.Module, rank: int = 0, ranks: int = 1):
        self.net, self.index, self.training = net, torch.arange(rank, IMAGES, ranks), []

    @torch.no_grad()
    def __call__(self, fn: Callable[[Tensor], Tensor], /) -> tuple[Tensor, Tensor]:
        parts = []
        for part in self.index.split(15):
            self.training.append(self.net.training)
            parts.append(fn(images()[part]))
        return self.index, torch.cat(parts)

    def representation(self, name: str, /) -> tuple[Tensor, Tensor]:
        raise AssertionError(f"no method here looks at representations ({name})")


def batch_of(index: Tensor, views: int = 1, *, local: int = 0) -> Batch:
    """Views that are the images themselves, the second one darker, and so on."""
    x = images()[index]
    streams = {"global": torch.stack([x * 0.9**view for view in range(views)])}
    if local:
        streams["local"] = torch.stack([x * 0.8**view for view in range(local)])
    return Batch(index, streams, {})
