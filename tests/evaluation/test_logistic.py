"""Logistic regression on few labels, each draw against scikit-learn's, and what is said of all draws together."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mvmr.evaluation import logistic as module
from mvmr.evaluation.intervals import mean_interval
from mvmr.evaluation.logistic import LogisticConfig, drawn, logistic, mean_of_draws
from mvmr.evaluation.measured import with_intervals
from mvmr.evaluation.regularisation import STRENGTHS, UNCHOSEN, chosen_l2
from mvmr.types import Features, RunError, UserError


def digits_split() -> tuple[Features, Features]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    return Features(x[:1200], y[:1200]), Features(x[1200:], y[1200:])


def watched_rows(
    train: Features, test: Features, config: LogisticConfig, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """The rows of the training split that each draw takes."""
    rows: list[Tensor] = []
    choose = module.per_class

    def watched(*given, **settings) -> Tensor:
        rows.append(choose(*given, **settings))
        return rows[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "per_class", watched)
        drawn(train, test, config)
    return rows


@pytest.mark.parametrize(("labels", "l2"), [(1, 1.0), (7, 10.0), (20, 1000.0)])
def test_every_draw_is_scikit_learns_optimum(labels: int, l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits_split()
    config = LogisticConfig(labels_per_class=labels, draws=3, l2=l2)
    rows, found = watched_rows(train, test, config, monkeypatch), drawn(train, test, config)
    assert found.l2 == [l2] * 3
    assert found.images == 10 * labels
    for number in range(3):
        x, y = train.x[rows[number]].double().numpy(), train.y[rows[number]].numpy()
        scaler = StandardScaler().fit(x)
        reference = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10_000).fit(scaler.transform(x), y)
        right = reference.predict(scaler.transform(test.x.double().numpy())) == test.y.numpy()
        # One image in 597 may lie on the border.
        assert (right != found.correct[number].numpy()).sum() <= 1
        assert found.metrics["top1"][number] == pytest.approx(100 * found.correct[number].double().mean().item())


def test_the_strength_is_chosen_from_the_drawn_labels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits_split()
    config = LogisticConfig(labels_per_class=12, draws=3)
    rows, found = watched_rows(train, test, config, monkeypatch), drawn(train, test, config)
    assert found.l2 == [chosen_l2(train.x[one], train.y[one], classes=10) for one in rows]
    assert set(found.l2) <= set(STRENGTHS)
    # Neither the test split nor the labels that were not drawn have a say.
    others = torch.ones(1200, dtype=torch.bool)
    others[torch.cat(rows)] = False
    spoilt = Features(train.x.masked_fill(others[:, None], 7.0), train.y)
    wrong = drawn(spoilt, Features(test.x, (test.y + 1) % 10), config)
    assert wrong.l2 == found.l2
    assert max(wrong.metrics["top1"]) < 20 < 70 < min(found.metrics["top1"])
    single = drawn(train, test, LogisticConfig(labels_per_class=1, draws=2))
    assert single.l2 == [UNCHOSEN] * 2


def test_what_is_said_of_the_draws() -> None:
    train, test = digits_split()
    config = LogisticConfig(labels_per_class=5, draws=6, l2=1.0)
    found, metrics = drawn(train, test, config), logistic(train, test, config)
    for name in ("top1", "top5"):
        values = found.metrics[name]
        low, high = stats.t.interval(0.95, 5, loc=np.mean(values), scale=stats.sem(values))
        assert metrics[name] == pytest.approx(np.mean(values))
        assert metrics[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == pytest.approx((low, high))
    assert (metrics["n_train"], metrics["l2"]) == (50.0, 1.0)
    assert set(metrics) == {f"{name}{end}" for name in ("top1", "top5") for end in ("", "_std", "_low", "_high")} | {
        "n_train", "l2",
    }  # fmt: skip
    assert metrics["top1_std"] > 0.2  # draws differ
    assert found.correct.shape == (6, 597)
    of_images = mean_interval(100.0 * found.correct.double().mean(0))
    assert of_images.value == pytest.approx(metrics["top1"])
    assert of_images.low < of_images.value < of_images.high


def test_no_difference_is_told_that_leaves_the_draws_out() -> None:
    train, test = digits_split()
    metrics = logistic(train, test, LogisticConfig(labels_per_class=3, draws=2, l2=1.0))
    assert metrics.outcomes == {}
    assert with_intervals(metrics) == dict(metrics)  # Student's, over draws, as they are


def test_the_interval_of_the_mean_covers_it() -> None:
    """Of 400 sets of 8 normal draws, 95 % have the mean inside; with binomial noise, 92 to 98 %."""
    generator = torch.Generator().manual_seed(0)
    values = 60.0 + 3.0 * torch.randn(400, 8, generator=generator, dtype=torch.float64)
    intervals = [mean_of_draws(row) for row in values.tolist()]
    covered = sum(interval.low <= 60.0 <= interval.high for interval in intervals)
    assert 368 <= covered <= 392
    assert mean_of_draws([1.0, 2.0]).high == pytest.approx(1.5 + 12.7062 * 0.5, abs=1e-3)


def test_draws_are_of_every_class_and_the_same_for_every_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits_split()
    config = LogisticConfig(labels_per_class=4, draws=3, l2=1.0)
    rows = watched_rows(train, test, config, monkeypatch)
    for one in rows:
        assert train.y[one].bincount().tolist() == [4] * 10
        assert len(one.unique()) == 40
    assert len({tuple(one.tolist()) for one in rows}) == 3
    torch.manual_seed(5)
    other = Features(train.x[:, :20].square() + 1, train.y)
    again = watched_rows(other, Features(test.x[:, :20].square() + 1, test.y), config, monkeypatch)
    assert all(torch.equal(one, same) for one, same in zip(rows, again, strict=True))
    more = watched_rows(train, test, config.model_copy(update={"labels_per_class": 9, "draws": 4}), monkeypatch)
    assert all(set(one.tolist()) < set(wide.tolist()) for one, wide in zip(rows, more[:3], strict=True))
    elsewhere = watched_rows(train, test, config.model_copy(update={"seed": 1}), monkeypatch)
    assert not {tuple(one.tolist()) for one in rows} & {tuple(one.tolist()) for one in elsewhere}
    assert logistic(train, test, config) == logistic(train, test, config)


def test_more_labels_help() -> None:
    train, test = digits_split()
    few, more = (logistic(train, test, LogisticConfig(labels_per_class=n, draws=4)) for n in (2, 40))
    assert few["top1_high"] < more["top1_low"]
    assert more["top1"] > 85
    assert more["top1_std"] < few["top1_std"]


def test_fewer_than_six_classes_have_no_top5() -> None:
    train, test = digits_split()
    parts = [Features(part.x[part.y < 5], part.y[part.y < 5]) for part in (train, test)]
    metrics = logistic(*parts, LogisticConfig(labels_per_class=3, draws=2))
    assert set(metrics) == {"top1", "top1_std", "top1_low", "top1_high", "n_train", "l2"}


def test_wrong_features_and_settings() -> None:
    train, test = digits_split()
    with pytest.raises(UserError, match="train split has no labels"):
        logistic(Features(train.x), test, LogisticConfig())
    with pytest.raises(RunError, match="not finite"):
        logistic(train, Features(test.x * math.nan, test.y), LogisticConfig())
    fewest = int(train.y.bincount().min())
    with pytest.raises(UserError, match=rf"labels_per_class={fewest + 1}, but class \d has {fewest}"):
        logistic(train, test, LogisticConfig(labels_per_class=fewest + 1))
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        LogisticConfig(draws=1)
    with pytest.warns(UserWarning, match=r"logistic stopped short.*logistic\.max_iterations"):
        logistic(train, test, LogisticConfig(draws=2, l2=1e-3, max_iterations=1))
    with pytest.raises(statistics.StatisticsError):
        mean_of_draws([1.0])


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    train, test = digits_split()
    moved = [Features(part.x.cuda(), part.y) for part in (train, test)]
    config = LogisticConfig(draws=2)
    assert logistic(*moved, config) == pytest.approx(logistic(train, test, config), abs=0.4)
