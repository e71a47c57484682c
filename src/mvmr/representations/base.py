"""What every representation is: a fixed map of the plain image, without parameters and without gradient."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from mvmr.types import UserError

Map = TypeVar("Map", bound=Callable[..., Tensor])


class Representation(nn.Module, ABC):
    """A fixed map of normalised images, [B, 3, H, W] to [B, F] (Z*_k in Eq. 11 of the MV-MR paper).

    Deterministic; computed in float32 whatever autocast says; no trainable parameters; the result has no gradient.
    """

    varies: ClassVar[bool] = False
    """True if the map changes from epoch to epoch, so that its result cannot be cached."""
    cheap: ClassVar[bool] = False
    """True if making it costs no more than reading it back, so that it is not cached."""
    learned: ClassVar[bool] = False
    """True for a trained network's output, which is cached at its full width; others may be projected."""
    version: ClassVar[int] = 1
    """Raised whenever the map changes, so that what was cached of the old one is not taken for the new."""

    settings: Mapping[str, Any] | None = None
    """The constructor's settings, set by `build_representations`; part of `fingerprint`."""

    def fingerprint(self) -> str | None:
        """Hexadecimal digits that differ whenever the map does; None where that is not known: it is not cached."""
        if self.settings is None:
            return None
        described = json.dumps([type(self).__name__, self.version, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(described.encode()).hexdigest()[:32]

    @abstractmethod
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        """[B, 3, H, W] normalised float images to [B, F] float32.

        `index` ([B] int64, positions in the data set) and `epoch` are read only by representations that vary.
        Raises UserError if the images are not a floating-point batch or too small.
        """


def fixed(function: Map) -> Map:
    """Decorate a method whose first argument is a batch of images: float32, autocast off, no gradient."""

    @functools.wraps(function)
    def without_gradient(self: nn.Module, images: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        taker = f"{type(self).__name__} takes"
        if images.ndim != 4 or 0 in images.shape[1:]:
            raise UserError(f"{taker} a batch of images [B, C, H, W], not a tensor of shape {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise UserError(f"{taker} normalised float images, (x / 255 - mean) / std, not {images.dtype}.")
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return function(self, images.detach().float(), *arguments, **settings)

    return cast(Map, without_gradient)
