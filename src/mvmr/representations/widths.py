"""How wide what a batch holds of every representation is."""

from __future__ import annotations

import torch
from torch import nn

from mvmr.representations.base import Representation
from mvmr.representations.cache import CacheConfig


@torch.no_grad()
def widths_in_batches(representations: nn.ModuleDict, config: CacheConfig, *, size: int) -> dict[str, int]:
    """{name: F} of a batch's rows [B, F], found out on one black image of `size` pixels; the cache may narrow them."""
    image, first = torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64)
    widths = {}
    for name, representation in representations.items():
        features = representation(image, first, 0).flatten(1).shape[1]
        widths[name] = min(features, config.width) if config.width and _narrowed(representation, config) else features
    return widths


def _narrowed(representation: nn.Module, config: CacheConfig) -> bool:
    """Whether it is kept, and if it is wide as a projection, as `cache_representations` does."""
    if not (config.enabled and isinstance(representation, Representation)) or representation.learned:
        return False
    return not (representation.varies or representation.cheap) and representation.fingerprint() is not None
