"""A frozen network and the images that it is made for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Output = Literal["vector", "features"]
Interpolation = Literal["bicubic", "bilinear"]
Reading = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class TeacherInput:
    """The images that a network is made for."""

    image_size: int | None = None
    """Side in pixels; None takes images of any size as they are."""
    mean: tuple[float, ...] | None = None
    """Channel means taken from images in [0, 1]; None: those of the run."""
    std: tuple[float, ...] | None = None
    """Channel deviations that they are then divided by; None: those of the run."""
    interpolation: Interpolation = "bicubic"
    """How images are resized to `image_size`."""


class TeacherNet(nn.Module):
    """A frozen network in eval mode: images [B, 3, S, S], normalised its own way, to one tensor.

    [B, D] for the vector; for features [B, T, D] tokens, of which the first `prefix_tokens` stand for no place in the
    image, or a map [B, C, h, w].
    """

    def __init__(self, net: nn.Module, read: Reading, given: TeacherInput, *, name: str, prefix_tokens: int = 0):
        super().__init__()
        self.net = net
        self.name, self.prefix_tokens = name, prefix_tokens
        self.image_size, self.mean, self.std = given.image_size, given.mean, given.std
        self.interpolation = given.interpolation
        self._read = read
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TeacherNet:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self._read(self.net, images)


def whole(net: nn.Module, images: Tensor) -> Tensor:
    """What the network returns."""
    return net(images)


def near(name: str, known: Iterable[str]) -> str:
    """Close names, as a sentence's end."""
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)
    return f"; close names: {', '.join(close)}" if close else ""
