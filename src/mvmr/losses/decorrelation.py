"""What makes an embedding's dimensions differ: Barlow Twins' cross-correlation and VICReg's covariance.

Both need the diagonal of a [D, D] matrix C = X^T Y and the squares of all its other elements. Where the batch is much
smaller than D, C is not made: the sum of all squares is that of two [B, B] matrices,

    sum_ij (X^T Y)_ij^2 = sum_kl (X X^T)_kl (Y Y^T)_kl

and the diagonal's is taken off. That loses no digits: C then has a rank below B, so tr(C)^2 <= (B - 1) sum_ij C_ij^2,
and at least half of the sum is off the diagonal where 2 B <= D and the diagonal is constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.precision import at_least_float32, matmul


def cross_correlation(z1: Tensor, z2: Tensor, *, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Barlow Twins Eq. 2 in the two parts that Eq. 1 takes: [B, D], [B, D] -> c_ii [D], sum of c_ij^2 over i != j.

    c_ij is the correlation over the batch of column i of z1 and column j of z2, in [-1, 1]: not a cosine, the columns
    are centred. epsilon is added to their biased variances, as batch norm does in the official code, so that a constant
    column has the correlation 0 and a finite gradient; with 0 (Eq. 2) it has NaN. Computed in float32 (or float64)
    whatever autocast and TF32 say. Raises ValueError for shapes that differ and for fewer than two rows.
    """
    if z1.shape != z2.shape or z1.dim() != 2 or z1.shape[0] < 2:
        raise ValueError(
            f"cross_correlation needs two [B, D] embeddings with B >= 2, not {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    with torch.autocast(z1.device.type, enabled=False):
        return _diagonal_and_other_squares(_standardised(z1, epsilon), _standardised(z2, epsilon))


def covariance_penalty(z: Tensor) -> Tensor:
    """VICReg Eqs. 3 and 4, the squared covariances of different columns, summed and divided by D: [B, D] -> scalar.

    c(Z) = 1/D sum_{i != j} C_ij^2 with C = 1/(B - 1) sum_k (z_k - mean)(z_k - mean)^T. Computed in float32 (or float64)
    whatever autocast and TF32 say. Raises ValueError for fewer than two rows.
    """
    if z.dim() != 2 or z.shape[0] < 2:
        raise ValueError(f"covariance_penalty needs [B, D] embeddings with B >= 2, not {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        centred = (z - z.mean(0)) / (z.shape[0] - 1) ** 0.5  # [B, D], whose product with itself is C
        return _diagonal_and_other_squares(centred, centred)[1] / z.shape[1]


def _standardised(z: Tensor, epsilon: float) -> Tensor:
    """Columns of mean 0 and squared norm 1 (but for epsilon): [B, D] -> [B, D]."""
    z = at_least_float32(z)
    centred = z - z.mean(0)
    variance = centred.square().mean(0)  # [D]; biased
    return centred * (z.shape[0] * (variance + epsilon)).rsqrt()


def _diagonal_and_other_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of C = X^T Y, and the sum of the squares of its other elements: [B, D] twice -> [D], scalar."""
    diagonal = (x * y).sum(0)  # [D]
    rows, columns = x.shape
    if 2 * rows <= columns:
        gram = matmul(x, x.T)  # [B, B]
        other = gram if y is x else matmul(y, y.T)
        return diagonal, (gram * other).sum() - diagonal.square().sum()
    c = matmul(x.T, y)  # [D, D]
    c.fill_diagonal_(0)  # in place, for it may be large; taking the diagonal's squares off the sum would lose digits
    return diagonal, c.square().sum()
