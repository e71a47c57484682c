"""The invariance and variance terms of MV-MR (Eqs. 6 to 8)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mvmr.losses.distance_correlation import safe_sqrt
from mvmr.ops.precision import at_least_float32


def invariance(z1: Tensor, z2: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """MV-MR Eq. 6, the squared distance between two views: [B, D], [B, D] -> scalar.

    "sum" adds up over D and averages over B, as Eq. 6 is printed; "mean" averages over both, as the official code:
    smaller by the factor D, which at D = 8192 decides whether embeddings shrink. Computed in float32 (or float64)
    whatever autocast says. Raises ValueError for shapes that differ and for another reduction.
    """
    if z1.shape != z2.shape or z1.dim() != 2:
        raise ValueError(f"invariance compares two [B, D] embeddings, not {tuple(z1.shape)} and {tuple(z2.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' (over B and D) or 'sum' (over D), not {reduction!r}")
    with torch.autocast(z1.device.type, enabled=False):
        squares = (at_least_float32(z1) - at_least_float32(z2)).square()  # [B, D]
        return squares.mean() if reduction == "mean" else squares.sum(1).mean()


def variance_hinge(z: Tensor, *, gamma: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """MV-MR Eqs. 7 and 8, how far each column's deviation is below gamma, on average: [B, D] -> scalar.

    v(Z) = mean over columns of max(0, gamma - sqrt(Var + epsilon)), with the unbiased variance over the batch.
    epsilon=0 is the plain standard deviation of the official code, with a zero gradient where a column is constant.
    Computed in float32 (or float64) whatever autocast says. Raises ValueError for fewer than two rows.
    """
    if z.dim() != 2 or z.shape[0] < 2:
        raise ValueError(f"variance_hinge needs [B, D] embeddings with B >= 2, not {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        deviation = safe_sqrt(at_least_float32(z).var(dim=0) + epsilon)  # [D]
        return torch.relu(gamma - deviation).mean()
