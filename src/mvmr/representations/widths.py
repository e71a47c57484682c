"""How wide what a batch holds of a representation is."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from mvmr.representations.base import Representation
from mvmr.representations.cache import CacheConfig


@torch.no_grad()
def width_in_batches(
    representations: nn.ModuleDict, config: CacheConfig, name: str, *, size: int, device: torch.device
) -> int:
    """F of a batch's rows [B, F] of one representation, found out on one black image of `size` pixels.

    The cache may narrow them. No other representation is called. device: the run's, for teachers whose own is not seen.
    """
    representation = representations[name]
    image = torch.zeros(1, 3, size, size, device=_home(representation, device))
    features = representation(image, torch.zeros(1, dtype=torch.int64), 0).flatten(1).shape[1]
    return min(features, config.width) if config.width and _narrowed(representation, config) else features


def _home(representation: nn.Module, device: torch.device) -> torch.device:
    """Where an image has to be to be shown to it now, before anything is moved."""
    kept = next(chain(representation.parameters(), representation.buffers()), None)
    if kept is not None:
        return kept.device
    # What a function from Python closes over is out of sight, and has to be where the run gives it images.
    learned = isinstance(representation, Representation) and representation.learned
    return device if learned else torch.device("cpu")


def _narrowed(representation: nn.Module, config: CacheConfig) -> bool:
    """Whether it is kept, and if it is wide as a projection, as `cache_representations` does."""
    if not (config.enabled and isinstance(representation, Representation)) or representation.learned:
        return False
    return not (representation.varies or representation.cheap) and representation.fingerprint() is not None
