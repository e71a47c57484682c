"""Distance covariance and correlation of two samples of any widths (Szekely, Rizzo and Bakirov 2007; MV-MR Eqs. 3, 5).

Two stages, so that each distance matrix is made once however many pairs it enters: `centred_distances` turns a sample
into its doubly centred distance matrix [n, n], and `correlation_of` compares two of those. Work and memory are
O(n^2 F) and O(n^2 + n F): the distances come from the Gram matrix of the centred sample.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mvmr.ops.collectives import gather
from mvmr.ops.modes import full_float32

Estimator = Literal["v", "u"]


def distance_correlation(
    x: Tensor,
    y: Tensor,
    *,
    power: int = 2,
    estimator: Estimator = "v",
    floor: float = 0.0,
    across_ranks: bool = False,
) -> Tensor:
    """MV-MR Eq. 3, dCor = dCov^2(X, Y) / sqrt(dVar(X) dVar(Y)): [n, ...], [n, ...] -> scalar.

    power: 2 gives R^2 of the paper, 1 gives R, its root, of the official code.
    estimator: "v", the paper's biased V-statistic in [0, 1]; "u", the unbiased one (Szekely and Rizzo 2014), which may
        be negative: its root is then sign(r) sqrt(|r|).
    floor: lower bound of the squared distances; the official code has 1e-4, on the diagonal too.
    across_ranks: gathers both samples over ranks first, with gradient.
    A constant sample has the value 0 and gradients 0. float32 (or float64) whatever autocast and TF32 say.
    Raises ValueError for unequal n, n below 2 ("v") or 4 ("u"), and an unknown power or estimator.
    """
    _check_power(power)
    a, b = _pair_of_centred_distances(x, y, estimator, floor, across_ranks)
    return correlation_of(a, b, power=power, estimator=estimator)


def distance_covariance(x: Tensor, y: Tensor, *, estimator: Estimator = "v", across_ranks: bool = False) -> Tensor:
    """The squared distance covariance dCov^2 of MV-MR Eq. 5: [n, ...], [n, ...] -> scalar; see distance_correlation."""
    a, b = _pair_of_centred_distances(x, y, estimator, 0.0, across_ranks)
    return covariance_of(a, b, estimator=estimator)


def centred_distances(x: Tensor, *, estimator: Estimator = "v", floor: float = 0.0) -> Tensor:
    """The doubly centred matrix of Euclidean distances between rows, A of MV-MR sec. 3: [n, ...] -> [n, n].

    "v": A = a - row mean - column mean + mean. "u": U-centred (Szekely and Rizzo 2014, Eq. 2.2), zero diagonal.
    A matrix that is zero but for rounding (a constant sample) is exactly zero. Rows with NaN or infinity give NaN.
    Raises ValueError for n below 2 ("v") or 4 ("u"), and an unknown estimator.
    """
    rows = 2 if _check_estimator(estimator) == "v" else 4
    if x.dim() == 0 or x.shape[0] < rows:
        raise ValueError(f"distance correlation with estimator {estimator!r} needs at least {rows} rows: {x.shape=}")
    with torch.autocast(x.device.type, enabled=False):
        distances = _distances(at_least_float32(x.reshape(x.shape[0], -1)), floor)
        centred = _v_centred(distances) if estimator == "v" else _u_centred(distances)
        rounding = 32 * torch.finfo(centred.dtype).eps * distances.detach().amax()
        return torch.where(centred.detach().abs().amax() <= rounding, 0.0, centred)


def covariance_of(a: Tensor, b: Tensor, *, estimator: Estimator = "v") -> Tensor:
    """The dCov^2 of two matrices made by `centred_distances` with the same estimator: [n, n], [n, n] -> scalar."""
    if a.shape != b.shape:
        raise ValueError(f"distance correlation pairs rows, but there are {a.shape[0]} and {b.shape[0]}")
    n = a.shape[0]
    return (a * b).mean() if _check_estimator(estimator) == "v" else (a * b).sum() / (n * (n - 3))


def correlation_of(a: Tensor, b: Tensor, *, power: int = 2, estimator: Estimator = "v") -> Tensor:
    """The dCor of two matrices made by `centred_distances` with the same estimator: [n, n], [n, n] -> scalar."""
    _check_power(power)
    with torch.autocast(a.device.type, enabled=False):
        # Two roots, not the root of the product, which underflows in float32 for distances near 1e-10.
        scale = _deviation(a, estimator) * _deviation(b, estimator)
        constant = scale == 0
        ratio = covariance_of(a, b, estimator=estimator) / torch.where(constant, 1.0, scale)
        squared = torch.where(constant, 0.0, ratio)
        if power == 2:
            return squared
        # A V-statistic is below zero only by rounding; a U-statistic may be, and keeps its sign.
        return safe_sqrt(squared) if estimator == "v" else squared.sign() * safe_sqrt(squared.abs())


def _deviation(a: Tensor, estimator: Estimator) -> Tensor:
    return safe_sqrt(covariance_of(a, a, estimator=estimator))


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt(max(x, 0)), with gradient 0 where x <= 0; NaN stays NaN."""
    zero = x <= 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())  # the inner where keeps 0 * inf out of the gradient


def at_least_float32(x: Tensor) -> Tensor:
    """The same values in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _pair_of_centred_distances(
    x: Tensor, y: Tensor, estimator: Estimator, floor: float, across_ranks: bool
) -> tuple[Tensor, Tensor]:
    if across_ranks:
        x, y = gather(x), gather(y)
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(f"distance correlation pairs rows, but the samples are {tuple(x.shape)} and {tuple(y.shape)}")
    a = centred_distances(x, estimator=estimator, floor=floor)
    return a, centred_distances(y, estimator=estimator, floor=floor)


def _check_power(power: int) -> None:
    if power not in (1, 2):
        raise ValueError(f"power must be 2 (R^2, as in the paper) or 1 (R, as in the official code), not {power!r}")


def _check_estimator(estimator: str) -> str:
    if estimator not in ("v", "u"):
        raise ValueError(f"estimator must be 'v' (biased, as in the paper) or 'u' (unbiased), not {estimator!r}")
    return estimator


def _distances(x: Tensor, floor: float) -> Tensor:
    """Euclidean distances between the rows of x [n, F], with an exactly zero diagonal (unless floor > 0): [n, n]."""
    # Centring changes no distance, and no gradient either: a shift common to all rows. Without it the Gram matrix of
    # data far from the origin would cancel.
    x = x - x.detach().mean(0)
    gram = torch.ops.mvmr.matmul(x, x.T)  # [n, n]
    norms = gram.diagonal()
    squares = norms[:, None] + norms[None, :] - 2 * gram
    if floor > 0:
        return squares.clamp(min=floor).sqrt()
    # Equal rows may differ by the rounding of F products, measured at up to sqrt(F) / 9 units; below that is zero.
    units = 2 + x.shape[1] ** 0.5 / 4
    rounding = units * torch.finfo(x.dtype).eps * (norms[:, None] + norms[None, :]).detach()
    return safe_sqrt(torch.where(squares <= rounding, 0.0, squares))


def _v_centred(distances: Tensor) -> Tensor:
    means = distances.mean(1)  # [n]; the matrix is symmetric
    return distances - means[:, None] - means[None, :] + means.mean()


def _u_centred(distances: Tensor) -> Tensor:
    n = distances.shape[0]
    diagonal = torch.eye(n, dtype=torch.bool, device=distances.device)
    sums = distances.masked_fill(diagonal, 0.0).sum(1)  # [n]
    total = sums.sum() / ((n - 1) * (n - 2))
    centred = distances - (sums[:, None] + sums[None, :]) / (n - 2) + total
    return centred.masked_fill(diagonal, 0.0)


# An operator of its own, because the switch must also be off in the backward pass, and torch.compile can neither trace
# the switch nor know of it: it takes the operator as it is.
torch.library.define("mvmr::matmul", "(Tensor a, Tensor b) -> Tensor")


@torch.library.impl("mvmr::matmul", "CompositeExplicitAutograd")
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False), full_float32(a.device.type):
        return a @ b


@torch.library.register_fake("mvmr::matmul")
def _matmul_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    return (
        torch.ops.mvmr.matmul(gradient, b.T) if ctx.needs_input_grad[0] else None,
        torch.ops.mvmr.matmul(a.T, gradient) if ctx.needs_input_grad[1] else None,
    )


torch.library.register_autograd("mvmr::matmul", _matmul_gradients, setup_context=_keep_factors)
