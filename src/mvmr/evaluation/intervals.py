"""How sure a measured number is: bootstrap confidence intervals over the test images (Efron and Tibshirani, 1993).

They say how the number would move with other test images of the same kind. They do not say how it would move with
another training run: for that, train with several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mvmr.ops.random import uniform
from mvmr.types import UserError

Kind = Literal["percentile", "bca", "centred"]
"""percentile: Efron and Tibshirani, Section 13.3; bca: corrected for bias and skewness, Section 14.3; centred: the
percentiles, moved by as much as the mean of the resamples lies beside the value. An image that is drawn twice lifts an
average precision, so that on few images the percentiles may all lie above the value: their width says how it would
move, their place does not."""

RESAMPLES = 10_000
RESAMPLES_OF_MANY = 2000
"""Of means of outcomes with many different values, which have to be gathered anew for each resample: the interval's
ends then vary by about 1.5 % of its width."""
INDEX_STREAM, COUNT_STREAM = 0xFFFFFFE1, 0xFFFFFFE2
"""Random streams, far from those of views."""
CHUNK = 2**17
"""Indices drawn at a time; a resample of more images is drawn whole."""
FEW = 8
"""With at most so many different outcomes, a resample is drawn by how often each occurs."""


@dataclass(frozen=True)
class Interval:
    """A number and what is credible beside it, in the unit of the outcomes."""

    value: float
    """Measured on the images themselves."""
    low: float
    high: float
    level: float
    """Confidence, 0.95 for a 95 % interval."""

    def named(self, name: str) -> dict[str, float]:
        """As metrics: {NAME, NAME_low, NAME_high}."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def mean_interval(
    outcomes: Tensor, *, level: float = 0.95, kind: Kind = "percentile", resamples: int | None = None, seed: int = 0
) -> Interval:
    """The mean of outcomes [M], one an image, with its bootstrap interval; give 100 * correct for percent.

    kind: see `Kind`. A pure function of the outcomes and the seed. Outcomes that are all equal leave the interval
    without width: where no image, or every one, is right, it is too narrow. resamples: None takes 10,000, or 2,000
    where outcomes have more than 8 different values. Working space does not grow with the number of resamples.
    Raises UserError for outcomes that are NaN or fewer than two.
    """
    x = _checked(outcomes)
    means = _resampled_means(x, resamples, seed)
    # Without image i the mean moves by (mean - x_i) / (M - 1): the jackknife in closed form.
    return _interval(float(x.mean()), means, lambda: (x.mean() - x) / (len(x) - 1), level, kind)


def paired_interval(
    first: Tensor,
    second: Tensor,
    *,
    level: float = 0.95,
    kind: Kind = "percentile",
    resamples: int | None = None,
    seed: int = 0,
) -> Interval:
    """The mean of first - second [M], two encoders' outcomes on the same images, with its bootstrap interval.

    Images are resampled in pairs, so that what is hard for both cancels: the interval is narrower than that of two
    independent numbers, and 0 outside it means a difference. resamples: as in `mean_interval`. Raises UserError as that
    does, and for outcomes of different images.
    """
    if first.shape != second.shape:
        raise UserError(
            f"outcomes {list(first.shape)} and {list(second.shape)} are compared image by image; give two encoders' "
            "outcomes on the same images in the same order"
        )
    difference = first.detach().cpu().double() - second.detach().cpu().double()
    return mean_interval(difference, level=level, kind=kind, resamples=resamples, seed=seed)


def statistic_interval(
    statistic: Callable[[Tensor], float | Tensor],
    images: int,
    *,
    level: float = 0.95,
    kind: Kind = "percentile",
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Any statistic of a set of images, such as mAP over classes, with its bootstrap interval.

    statistic: called with positions [images] int64 on the CPU, some of which occur repeatedly, returns one number; once
    with all images in order, then once a resample, and for kind "bca" once more an image, each left out. For the
    difference of two encoders, return it: the positions are the same for both. Raises UserError for fewer than two
    images and for a statistic that is NaN.
    """
    if images < 2:
        raise UserError(f"an interval needs two images or more, not {images}")
    whole = torch.arange(images)
    value = float(statistic(whole))
    drawn = [float(statistic(index)) for part in resampled(images, resamples, seed) for index in part]

    def jackknife() -> Tensor:
        left_out = [float(statistic(torch.cat([whole[:i], whole[i + 1 :]]))) for i in range(images)]
        values = torch.tensor(left_out, dtype=torch.float64)
        return values - values.mean()

    return _interval(value, torch.tensor(drawn, dtype=torch.float64), jackknife, level, kind)


def resampled(images: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Positions drawn with replacement, [b, images] int64 at a time, `resamples` rows in all.

    A row is a pure function of (seed, its number, images), so the size of the parts changes nothing.
    """
    for part in torch.arange(resamples).split(max(1, CHUNK // images)):
        yield (uniform(seed, 0, part, INDEX_STREAM, images) * images).long()


def _resampled_means(x: Tensor, resamples: int | None, seed: int) -> Tensor:
    """[resamples] float64."""
    values, counts = x.unique(return_counts=True)
    resamples = resamples or (RESAMPLES_OF_MANY if len(values) > FEW else RESAMPLES)
    if len(values) > FEW:
        return torch.cat([x[part].mean(1) for part in resampled(len(x), resamples, seed)])
    # Equal outcomes are interchangeable, so how often each is drawn is all that matters: multinomial counts, made of
    # binomial ones by their inverse distribution. The same bootstrap, at a cost that the images do not enter.
    from scipy.stats import binom  # type: ignore[import-untyped]

    drawn = uniform(seed, 0, torch.arange(resamples), COUNT_STREAM, len(values))
    total, left, others = torch.zeros(resamples, dtype=torch.float64), torch.full((resamples,), len(x)), len(x)
    for number, (value, count) in enumerate(zip(values[:-1].tolist(), counts[:-1].tolist(), strict=True)):
        found = torch.from_numpy(binom.ppf(drawn[:, number].numpy(), left.numpy(), count / others)).long()
        total += value * found
        left, others = left - found, others - count
    return (total + values[-1] * left) / len(x)


def _interval(value: float, drawn: Tensor, influence: Callable[[], Tensor], level: float, kind: Kind) -> Interval:
    """From the resampled statistics [B]; influence: the jackknife's values less their mean, [M], asked for by "bca"."""
    if not 0 < level < 1:
        raise UserError(f"level is {level:g}; it must be between 0 and 1, such as 0.95")
    if math.isnan(value) or bool(drawn.isnan().any()):
        raise UserError("the statistic is NaN, on the images or on a resample of them; define it for every resample")
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    if kind == "bca" and bool((drawn != drawn[0]).any()):
        tails = _corrected(tails, value, drawn, influence())
    low, high = torch.quantile(drawn, tails).tolist()
    aside = float(drawn.mean()) - value if kind == "centred" else 0.0
    return Interval(value, low - aside, high - aside, level)


def _corrected(tails: Tensor, value: float, drawn: Tensor, influence: Tensor) -> Tensor:
    """BCa's levels (Efron and Tibshirani, Section 14.3), equal resamples counting half to either side."""
    below = ((drawn < value).double() + (drawn <= value).double()).mean() / 2
    bias = torch.special.ndtri(below)
    if not bool(torch.isfinite(bias)):
        raise UserError(
            'every resample lies on one side of the value, so there is no BCa interval; use kind="percentile"'
        )
    spread = influence.square().sum()
    # The jackknife's sign: its mean less each value.
    acceleration = torch.where(spread > 0, -influence.pow(3).sum() / (6 * spread.clamp_min(1e-300).pow(1.5)), 0.0)
    shifted = bias + torch.special.ndtri(tails)
    return torch.special.ndtr(bias + shifted / (1 - acceleration * shifted))


def _checked(outcomes: Tensor) -> Tensor:
    """[M] float64 on the CPU."""
    if outcomes.ndim != 1 or len(outcomes) < 2:
        raise UserError(f"outcomes are {list(outcomes.shape)}; an interval needs one number an image, of two or more")
    x = outcomes.detach().cpu().double()
    if not bool(torch.isfinite(x).all()):
        raise UserError("outcomes are NaN or infinite; leave such images out, as in outcomes[outcomes.isfinite()]")
    return x
