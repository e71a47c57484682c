"""How features are spread, without labels: their spectrum, how far views of an image scatter, how even directions are.

Every function takes features as they are, [N, D] or several views of each image, [n, q, D], of any float type, and
computes in float64 on their device. A feature that is not finite gives NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FIRST_RANK, LAST_RANK = 6, 100
"""Ranks of the eigenvalues that the power law is fitted to, counted from 1: those of the authors' own library."""
EPSILON = 1e-7
"""Added to every share before its logarithm is taken, in RankMe and in LiDAR."""
# Numbers held at a time where pairs of images or views of images are gone through: 128 MiB in float64.
BLOCK = 2**24


class PowerLaw(NamedTuple):
    """A straight line through log eigenvalues over log ranks."""

    exponent: float
    """alpha of eigenvalue ~ rank^-alpha; above 0 for a falling spectrum."""
    r2: float
    """Share of the variance of the log eigenvalues that the line explains, weighted as the fit; 1 for a power law."""


def entropy_rank(values: Tensor) -> float:
    """The exponential of the entropy of values >= 0 [K] divided by their sum (Roy and Vetterli, 2007): 1 to K.

    RankMe's Eq. 1, with its epsilon. 0 where all are zero, NaN where one is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        return math.nan
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total + EPSILON
    return torch.exp(-(p * p.log()).sum()).item()


def covariance_spectrum(x: Tensor) -> Tensor:
    """Eigenvalues [min(N, D)], falling, of the covariance (over N) of features x [N, D]; those below rounding are 0."""
    centred = x.double() - x.double().mean(0)
    gram = centred.T @ centred if x.shape[0] >= x.shape[1] else centred @ centred.T
    if not bool(torch.isfinite(gram).all()):
        return torch.full((len(gram),), math.nan, dtype=torch.float64, device=x.device)
    values = torch.linalg.eigvalsh(gram / len(x)).flip(0)
    # Rounding of two kinds: of the features in their own type (a constant dimension of float32 varies by 1e-7 of its
    # value), and of the eigenvalues, relative to the greatest.
    own = torch.finfo(x.dtype).eps ** 2 * x.double().square().mean(0).sum()
    return torch.where(values <= torch.maximum(own, 1e-15 * len(gram) * values[0]), 0.0, values)


def power_law(spectrum: Tensor, *, first: int = FIRST_RANK, last: int = LAST_RANK) -> PowerLaw | None:
    """The law eigenvalue ~ rank^-alpha through ranks `first` to `last` of a falling spectrum [K]; None for under 5.

    A regression of log eigenvalue on log rank weighted by 1 / rank, so that every octave of ranks counts alike, as
    Stringer et al. (Nature 2019) and alpha-ReQ's authors have it. Eigenvalues that are 0 end the range.
    """
    end = min(last, int((spectrum > 0).sum()))
    if end - first + 1 < 5:
        return None
    ranks = torch.arange(first, end + 1, dtype=torch.float64, device=spectrum.device)
    x, y = ranks.log(), spectrum[first - 1 : first - 1 + len(ranks)].double().log()
    weight = (1 / ranks) / (1 / ranks).sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    slope = (weight * x * y).sum() / (weight * x * x).sum()
    spread = (weight * y * y).sum()
    left = (weight * (y - slope * x).square()).sum()
    # A flat spectrum is the power law of exponent 0, and its logarithms vary by rounding alone.
    r2 = 1.0 if spread < 1e-24 else 1.0 - (left / spread).item()
    return PowerLaw(-slope.item(), r2)


def alpha_req(x: Tensor, *, first: int = FIRST_RANK, last: int = LAST_RANK) -> PowerLaw | None:
    """alpha-ReQ (Agrawal et al., NeurIPS 2022, Section 3): `power_law` of the covariance of features x [N, D].

    None where fewer than five eigenvalues above 0 lie in the range: narrow, few or collapsed features. NaN likewise.
    """
    spectrum = covariance_spectrum(x)
    if bool(spectrum.isnan().any()):
        return PowerLaw(math.nan, math.nan)
    return power_law(spectrum, first=first, last=last)


def effective_dimension(x: Tensor) -> float:
    """The participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of x [N, D]; 0 for a point.

    From 1 (all on one line) to min(N - 1, D) (equal eigenvalues).
    """
    spectrum = covariance_spectrum(x)
    squares = spectrum.square().sum()
    return 0.0 if squares == 0 else (spectrum.sum().square() / squares).item()


def dimension_std(x: Tensor) -> Tensor:
    """The deviation (over N) of every dimension of x [N, D] as it is: [D] float64."""
    return x.double().std(dim=0, correction=0)


def lidar(x: Tensor, *, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al., ICLR 2024, Section 4): the entropy rank of the LDA matrix of q views of n images.

    x: [n, q, D], q >= 2. With the mean m_i of image i's views and m of all, S_b = mean_i (m_i - m)(m_i - m)^T and
    S_w = mean_ij (x_ij - m_i)(x_ij - m_i)^T + delta I, the matrix is S_w^-1/2 S_b S_w^-1/2. From 1 to min(n - 1, D);
    0 where all images have one mean. Not free of scale: delta counts where views of an image differ by less than its
    root in some direction. Raises ValueError for another shape, q below 2, and delta not above 0.
    """
    _check_views(x)
    if not delta > 0:
        raise ValueError(f"delta is {delta}; it must be above 0")
    if not bool(torch.isfinite(x).all()):
        return math.nan
    images, views, dim = x.shape
    means = x.mean(1, dtype=torch.float64)  # [n, D]
    within = delta * torch.eye(dim, dtype=torch.float64, device=x.device)
    for part, centre in zip(*(t.split(max(1, BLOCK // (views * dim))) for t in (x, means)), strict=True):
        scatter = (part.double() - centre[:, None]).flatten(0, 1)  # [b q, D]
        within += scatter.T @ scatter / (images * views)
    # With S_w = L L^T, the matrix L^-1 S_b L^-T has the same eigenvalues: squares of singular values, never below 0.
    root = torch.linalg.cholesky(within)
    whitened = torch.linalg.solve_triangular(root, (means - means.mean(0)).T, upper=False)  # [D, n]
    values = torch.linalg.svdvals(whitened).square()
    # Equal means leave rounding, which would have a rank of its own.
    rounding = (torch.finfo(x.dtype).eps * x.abs().max().double()).square() * dim / delta
    return 0.0 if values.sum() <= images * rounding else entropy_rank(values)


def uniformity(x: Tensor, *, t: float = 2.0) -> float:
    """L_uniform = log mean exp(-t |u - v|^2) over all pairs of x [N, D] scaled to unit length (Wang and Isola, ICML
    2020, Section 4).

    From -4 t (attained by two opposite points) to 0 (one point); lower is more even. Raises ValueError for N below 2.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"uniformity is of pairs of rows of [N, D], and this is {list(x.shape)}")
    unit = functional.normalize(x.double(), dim=1)
    norms = unit.square().sum(1)  # [N], 1 but for a row of zeros
    total = -torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)  # of the rows with themselves
    for block, own in zip(*(part.split(max(1, BLOCK // len(x))) for part in (unit, norms)), strict=True):
        squares = own[:, None] + norms - 2 * block @ unit.T  # [b, N]
        total += torch.exp(-t * squares.clamp_min(0)).sum()
    return (total / (len(x) * (len(x) - 1))).log().item()


def alignment(x: Tensor, *, power: float = 2.0) -> float:
    """L_align = mean |u - v|^power over all pairs of views of an image, x [n, q, D] scaled to unit length (Wang and
    Isola, Section 4).

    From 0 (views of an image agree) to 2^power; lower is closer. Raises ValueError for another shape or q below 2.
    """
    _check_views(x)
    images, views, dim = x.shape
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, BLOCK // (views * max(dim, views)))):
        unit = functional.normalize(part.double(), dim=2)
        exact = "donot_use_mm_for_euclid_dist"  # products would leave 1e-8 between equal views
        total += torch.cdist(unit, unit, compute_mode=exact).pow(power).sum()
    return (total / (images * views * (views - 1))).item()


def _check_views(x: Tensor) -> None:
    if x.ndim != 3 or len(x) < 1 or x.shape[1] < 2:
        raise ValueError(f"features of two or more views of each image are [n, q, D], and these are {list(x.shape)}")
