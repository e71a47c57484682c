"""Bootstrap intervals against scipy on the same resamples, against closed forms, and by how often they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from torch import Tensor

from mvmr.evaluation import intervals as module
from mvmr.evaluation.intervals import Interval, mean_interval, paired_interval, resampled, statistic_interval
from mvmr.types import UserError

KINDS = ["percentile", "bca"]


class Given(np.random.Generator):
    """A generator of numpy whose integers are our resamples, so that scipy has no luck of its own."""

    def __init__(self, seed: int):
        super().__init__(np.random.PCG64(0))
        self.seed = seed

    def integers(self, low: int, high: int, size: tuple[int, int], **others: object) -> np.ndarray:
        assert low == 0
        return torch.cat(list(resampled(high, size[0], self.seed))).numpy()


def of_scipy(samples, statistic, kind: str, *, resamples: int, seed: int, level: float = 0.95):
    found = stats.bootstrap(
        samples, statistic, n_resamples=resamples, confidence_level=level, paired=True,
        method={"percentile": "percentile", "bca": "BCa"}[kind], rng=Given(seed),
    )  # fmt: skip
    return found.confidence_interval


def skewed(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(count, generator=generator, dtype=torch.float64).log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_mean_is_scipys_on_the_same_resamples(kind: str, level: float) -> None:
    x = skewed(73)
    found = mean_interval(x, kind=kind, level=level, resamples=999, seed=5)
    expected = of_scipy((x.numpy(),), np.mean, kind, resamples=999, seed=5, level=level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == pytest.approx(x.mean().item(), abs=1e-12)
    assert found.level == level
    other = mean_interval(x, kind="bca" if kind == "percentile" else "percentile", level=level, resamples=999, seed=5)
    assert abs(other.low - found.low) > 1e-3  # the kinds differ on what is skewed


@pytest.mark.parametrize("kind", KINDS)
def test_a_paired_difference_is_scipys(kind: str) -> None:
    first, second = skewed(60, 1), skewed(60, 2)
    found = paired_interval(first, second, kind=kind, resamples=500, seed=1)

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    expected = of_scipy((first.numpy(), second.numpy()), difference, kind, resamples=500, seed=1)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    back = paired_interval(second, first, resamples=500, seed=1)
    forth = paired_interval(first, second, resamples=500, seed=1)
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))


@pytest.mark.parametrize("kind", KINDS)
def test_any_statistic_is_scipys(kind: str) -> None:
    """F1 over classes, which is no mean of outcomes of images."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 40)
    predicted = np.where(generator.random(40) < 0.6, y, generator.integers(0, 3, 40))

    def f1(index: Tensor) -> float:
        return f1_score(y[index], predicted[index], average="macro", labels=[0, 1, 2])

    found = statistic_interval(f1, 40, kind=kind, resamples=120, seed=3)

    def plain(a: np.ndarray, b: np.ndarray) -> float:
        return f1_score(a, b, average="macro", labels=[0, 1, 2])

    expected = stats.bootstrap(
        (y, predicted), plain, n_resamples=120, paired=True, vectorized=False,
        method="BCa" if kind == "bca" else "percentile", rng=Given(3),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == pytest.approx(plain(y, predicted))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_given_as_a_statistic_is_the_mean(kind: str) -> None:
    x = skewed(40)
    one = statistic_interval(lambda index: x[index].mean(), 40, kind=kind, resamples=300, seed=2)
    other = mean_interval(x, kind=kind, resamples=300, seed=2)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-12)


def test_a_centred_interval_has_the_same_width_about_the_value() -> None:
    """The largest of 30 numbers: no resample has a larger one, so that all percentiles lie below it."""
    x = skewed(30)
    percentile, centred = (
        statistic_interval(lambda index: x[index].max(), 30, kind=kind, resamples=400)
        for kind in ("percentile", "centred")
    )
    drawn = torch.cat([x[part].max(1).values for part in resampled(30, 400, 0)])
    assert percentile.high <= percentile.value
    assert centred.high - centred.low == pytest.approx(percentile.high - percentile.low)
    assert centred.low - percentile.low == pytest.approx(percentile.value - drawn.mean().item())
    assert centred.low < centred.value < centred.high


def test_few_outcomes_are_drawn_from_their_exact_distribution() -> None:
    """Of right and wrong, a resampled mean is binomial; its interval is between two of the distribution's quantiles."""
    correct = torch.arange(200) < 150
    drawn = module._resampled_means(correct.double(), 20_000, 0) * 200
    counts = drawn.round()
    torch.testing.assert_close(drawn, counts)
    observed = torch.bincount(counts.long() - 125, minlength=51)[:51].double().numpy()
    expected = 20_000 * stats.binom.pmf(np.arange(125, 176), 200, 0.75)
    expected[0], expected[-1] = 20_000 * stats.binom.cdf(125, 200, 0.75), 20_000 * stats.binom.sf(174, 200, 0.75)
    observed[0] += (counts < 125).sum()
    observed[-1] += (counts > 175).sum()
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    interval = mean_interval(100.0 * correct, resamples=20_000)
    assert interval.low == pytest.approx(stats.binom.ppf(0.025, 200, 0.75) / 2, abs=0.5)
    assert interval.high == pytest.approx(stats.binom.ppf(0.975, 200, 0.75) / 2, abs=0.5)


def test_drawing_by_counts_and_by_images_is_one_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-1.0, 0.0, 0.25, 1.0])[torch.randint(0, 4, (90,), generator=generator)].double()
    by_counts = module._resampled_means(x, 8000, 0)
    monkeypatch.setattr(module, "FEW", 3)
    by_images = module._resampled_means(x, 8000, 0)
    assert not torch.equal(by_counts, by_images)
    assert stats.ks_2samp(by_counts.numpy(), by_images.numpy()).pvalue > 1e-3
    for drawn in (by_counts, by_images):
        assert drawn.mean().item() == pytest.approx(x.mean().item(), abs=4 * x.std().item() / math.sqrt(90 * 8000))
        assert drawn.var().item() == pytest.approx(x.var(correction=0).item() / 90, rel=0.07)
    # A value so rare that many resamples are without it, and its whole rest.
    rare = torch.tensor([1.0] + [0.0] * 3 + [2.0] * 2, dtype=torch.float64)
    monkeypatch.setattr(module, "FEW", 8)
    drawn = module._resampled_means(rare, 8000, 1)
    assert drawn.mean().item() == pytest.approx(5 / 6, abs=0.05)
    assert set((drawn * 6).round().long().tolist()) == set(range(13))


@pytest.mark.parametrize("kind", KINDS)
def test_many_images_give_the_normal_interval(kind: str) -> None:
    for x, few in ((skewed(2000), False), ((skewed(2000, 1) < 1.2).double(), True)):
        assert (len(x.unique()) <= module.FEW) is few
        found = mean_interval(x, kind=kind, resamples=4000)
        half = 1.959964 * x.std(correction=0).item() / math.sqrt(2000)
        assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
        assert found.high == pytest.approx(found.value + half, abs=0.1 * half)


def test_intervals_cover_what_they_should() -> None:
    """Of 200 simulated test sets, about 95 % have the truth inside; with binomial noise, 91 to 99 %."""
    generator = torch.Generator().manual_seed(1)
    covered: dict[str, int] = {"accuracy": 0, "pair": 0, "gamma percentile": 0, "gamma bca": 0}
    for seed in range(200):
        first = torch.rand(120, generator=generator) < 0.7
        second = torch.where(
            torch.rand(120, generator=generator) < 0.8, first, ~first
        )  # right in 0.7 * 0.8 + 0.3 * 0.2
        gamma = -torch.rand(2, 60, generator=generator).log().sum(0)
        found = {
            "accuracy": (mean_interval(100.0 * first, resamples=250, seed=seed), 70.0),
            "pair": (paired_interval(first, second, resamples=250, seed=seed), 0.08),
            "gamma percentile": (mean_interval(gamma, resamples=250, seed=seed), 2.0),
            "gamma bca": (mean_interval(gamma, kind="bca", resamples=250, seed=seed), 2.0),
        }
        for name, (interval, truth) in found.items():
            covered[name] += interval.low <= truth <= interval.high
    assert all(181 <= count <= 198 for count in covered.values()), covered


def test_pairs_are_narrower_than_two_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2000, generator=generator) < 0.7
    second = torch.where(torch.rand(2000, generator=generator) < 0.95, first, ~first)
    paired = paired_interval(100.0 * first, 100.0 * second)
    alone = [mean_interval(100.0 * outcomes) for outcomes in (first, second)]
    apart = math.hypot(*(one.high - one.low for one in alone))
    assert paired.high - paired.low < 0.5 * apart
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    assert paired.low <= paired.value <= paired.high
    same = paired_interval(first, first)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_a_pure_function_of_the_seed_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = skewed(50)
    torch.manual_seed(0)
    first = mean_interval(x, resamples=200, seed=4)
    torch.manual_seed(1)
    assert mean_interval(x, resamples=200, seed=4) == first
    assert mean_interval(x, resamples=200, seed=5) != first
    whole = torch.cat(list(resampled(50, 200, 4)))
    assert whole.shape == (200, 50)
    largest = 0
    for chunk in (1, 170, 2**30):
        monkeypatch.setattr(module, "CHUNK", chunk)
        parts = list(resampled(50, 200, 4))
        largest = max(len(part) for part in parts)
        assert largest == {1: 1, 170: 3, 2**30: 200}[chunk]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat(list(resampled(50, 30, 4))), whole[:30])  # more resamples change none
    # Every image equally often: 10,000 draws of one in 50.
    assert stats.chisquare(whole.flatten().bincount(minlength=50).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_shift_go_through(kind: str) -> None:
    x = skewed(80)
    one, other = mean_interval(x, kind=kind, resamples=300), mean_interval(5.0 - 100.0 * x, kind=kind, resamples=300)
    assert other.value == pytest.approx(5 - 100 * one.value)
    assert (other.low, other.high) == pytest.approx((5 - 100 * one.high, 5 - 100 * one.low))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_outcomes_leave_no_width(kind: str) -> None:
    found = mean_interval(100.0 * torch.ones(30), kind=kind)
    assert found == Interval(100.0, 100.0, 100.0, 0.95)
    assert found.named("top1") == {"top1": 100.0, "top1_low": 100.0, "top1_high": 100.0}


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(UserError, match=r"outcomes are \[1\].*two or more"):
        mean_interval(torch.ones(1))
    with pytest.raises(UserError, match=r"outcomes are \[3, 2\]"):
        mean_interval(torch.ones(3, 2))
    with pytest.raises(UserError, match=r"NaN or infinite.*isfinite"):
        mean_interval(torch.tensor([1.0, math.nan, 0.0]))
    with pytest.raises(UserError, match=r"\[4\] and \[5\].*same images"):
        paired_interval(torch.ones(4), torch.ones(5))
    with pytest.raises(UserError, match="level is 95"):
        mean_interval(skewed(20), level=95)
    with pytest.raises(UserError, match="statistic is NaN"):
        statistic_interval(lambda index: math.nan if 0 not in index else 1.0, 5, resamples=50)
    with pytest.raises(UserError, match="two images or more, not 1"):
        statistic_interval(lambda index: 1.0, 1)
    with pytest.raises(UserError, match='use kind="percentile"'):  # fewer different images in every resample
        statistic_interval(lambda index: len(index.unique()), 30, kind="bca", resamples=50)
