"""Losses of normalised embeddings without negatives: SimSiam's cosine (Eq. 1) and BYOL's squared distance (Eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.unit import unit


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """SimSiam Eq. 1, D(p, z) = -p/||p|| . z/||z||, averaged over the batch: [B, D], [B, D] -> scalar in [-1, 1].

    The gradient reaches both; whose gradient stops (Eq. 3) is for the caller to say with `detach`. Computed in float32
    (or float64) whatever autocast says. A row of zeros has the cosine 0. Raises ValueError for shapes that differ.
    """
    p, z = _normalised_pair(p, z)
    return -(p * z).sum(1).mean()


def normalised_distance(q: Tensor, z: Tensor) -> Tensor:
    """BYOL Eq. 2, ||q/||q|| - z/||z||||^2 = 2 - 2 cos(q, z), averaged over the batch: [B, D] twice -> scalar in [0, 4].

    Gradient, precision and errors as `negative_cosine`'s. A row of zeros is at distance 1 of any other.
    """
    q, z = _normalised_pair(q, z)
    return (q - z).square().sum(1).mean()


@torch.no_grad()
def normalised_std(z: Tensor) -> Tensor:
    """The deviation over the batch of each column of z/||z||, averaged over columns: [B, D] -> scalar, no gradient.

    At most 1/sqrt(D), which it nears when embeddings point in all directions, and 0 when all are one (SimSiam, Section
    4.1). The deviation is the biased one, so that the bound holds for every B.
    """
    with torch.autocast(z.device.type, enabled=False):
        return unit(z).std(0, correction=0).mean()


def _normalised_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dim() != 2:
        raise ValueError(f"two [B, D] embeddings are compared, not {tuple(a.shape)} and {tuple(b.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        return unit(a), unit(b)
