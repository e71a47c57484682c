"""Principal components with whitening, of the rows of all ranks, none of which ever holds them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mvmr.errors import NOT_FINITE, RunError
from mvmr.ops.collectives import all_reduce_sum, from_first_rank
from mvmr.types import FeaturePass

PART = 1024
"""Rows worked on at a time, in float64."""
NEGLIGIBLE = 1e-9
"""Directions with less than this share of the largest variance are rounding; they are not blown up to variance 1."""


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) V diag(variance^-1/2): the first principal components, each with variance 1."""

    mean: Tensor
    """[D] float64."""
    directions: Tensor
    """[D, E] float64 of norm 1, the largest variance first; the largest component in size of each is positive."""
    scales: Tensor
    """[E] float64, what each component is multiplied by; 0 where there is no variance to speak of."""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, E], float32, or float64 for such rows; part by part."""
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        matrix = self.directions * self.scales  # [D, E]
        out = torch.empty(len(x), matrix.shape[1], dtype=kept, device=x.device)
        for rows, into in zip(x.split(PART), out.split(PART), strict=True):
            into.copy_((rows.double() - self.mean) @ matrix)
        return out


class Moments:
    """Count, sum and second moments of rows that come part by part, in float64: 8 D^2 bytes and no row kept."""

    def __init__(self, width: int, *, device: torch.device | str = "cpu"):
        self.table = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        """[[sum of x x^T, sum of x], [sum of x^T, count]]."""

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: [n, D], any float dtype."""
        with torch.autocast(x.device.type, enabled=False):
            for rows in x.split(PART):
                padded = torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], dim=1)
                self.table.addmm_(padded.T, padded)

    @torch.no_grad()
    def whitening(self, width: int, *, epsilon: float = 0.0) -> Whitening:
        """The whitening of all ranks' rows to `width` dimensions, or to D where that is fewer; equal on all ranks.

        Variances are those of n - 1, as scikit-learn's PCA(whiten=True) has them. epsilon: smaller variances are
        raised to this share of the largest before the root is taken (DeeperCluster's code: 1e-5). Raises ValueError for
        fewer than two rows, and RunError, on all ranks at once, where a row of any is not finite.
        """
        table = all_reduce_sum(self.table)
        count = float(table[-1, -1])
        if count < 2:
            raise ValueError(f"variances need two rows or more, not {count:.0f}")
        if not table.isfinite().all():
            raise RunError(NOT_FINITE)
        mean = table[:-1, -1] / count
        covariance = (table[:-1, :-1] / count - torch.outer(mean, mean)) * (count / (count - 1))
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0)[:width].clamp(min=0), directions.flip(1)[:, :width]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # [1, E]
        directions = directions * largest.sign()
        scales = torch.maximum(variances, epsilon * variances[0]).rsqrt()
        scales = torch.where(variances > NEGLIGIBLE * variances[0], scales, 0.0)
        # One rank's, because libraries may differ between machines in the last bit.
        return Whitening(mean, from_first_rank(directions), from_first_rank(scales))


def whitening_of(x: Tensor, width: int, *, epsilon: float = 0.0) -> Whitening:
    """`Moments.whitening` of x [n, D], this rank's rows."""
    moments = Moments(x.shape[1], device=x.device)
    moments.add(x)
    return moments.whitening(width, epsilon=epsilon)


def whitened_pass(
    pass_over: FeaturePass,
    features: Callable[[Tensor], Tensor],
    width: int,
    *,
    epsilon: float = 0.0,
    twice: bool = False,
) -> tuple[Tensor, Tensor]:
    """This rank's (index [n], x [n, E]) of features of every image: whitened principal components of norm 1.

    width, epsilon: as `Moments.whitening`. twice: compute the features twice, once for their moments and once to reduce
    them at once, so that n x D values are never held.
    """
    if twice:
        moments = _Gathering(features)
        pass_over(moments)
        assert moments.moments is not None
        whitening = moments.moments.whitening(width, epsilon=epsilon)
        index, x = pass_over(lambda images: whitening(features(images)))
    else:
        index, raw = pass_over(features)
        x = whitening_of(raw, width, epsilon=epsilon)(raw)
    return index, x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=1e-12))


class _Gathering:
    """Features into moments; what is returned takes next to no room."""

    def __init__(self, features: Callable[[Tensor], Tensor]):
        self.features = features
        self.moments: Moments | None = None

    def __call__(self, images: Tensor) -> Tensor:
        x = self.features(images)
        if self.moments is None:
            self.moments = Moments(x.shape[1], device=x.device)
        self.moments.add(x)
        return x.new_empty(len(x), 1)
