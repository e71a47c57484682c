"""Few labels on frozen features: logistic regression on n labels a class, drawn several times."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.data.label_subsets import per_class
from mvmr.evaluation.features import accuracies, labelled_pair
from mvmr.evaluation.intervals import Interval
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.regularisation import chosen_l2, logistic_regression
from mvmr.ops.random import step_seed
from mvmr.types import Features, Section


class LogisticConfig(Section):
    """Settings of `logistic`."""

    labels_per_class: int = Field(default=10, ge=1)
    """Images of each class that a draw trains on."""
    draws: int = Field(default=10, ge=2)
    """How often they are drawn."""
    l2: float | None = Field(default=None, gt=0)
    """Weight of |W|^2 / 2 beside the cross-entropy summed over the images (scikit-learn's 1 / C); the bias is free.
    null: for each draw the one of 0.1, 1, 10, 100, 1000, 10^4 and 10^5 with the least cross-entropy on held-out fifths
    of its labels, and 10 for one label a class, of which none can be held out."""
    max_iterations: int = Field(default=500, ge=1)
    """L-BFGS iterations at most; a warning says when they did not suffice."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws: they are the same images for every encoder."""


@dataclass(frozen=True)
class Draws:
    """What R draws of labels gave."""

    metrics: dict[str, list[float]]
    """{"top1": [R], "top5": [R]} in percent; no "top5" for five classes or fewer."""
    correct: Tensor
    """[R, M] bool: which test images each draw names rightly."""
    l2: list[float]
    """[R], the strength of each."""
    images: int
    """Trained on in each."""


def logistic(train: Features, test: Features, config: LogisticConfig) -> Metrics:
    """{"top1", "top1_std", "top1_low", "top1_high", "top5" ..., "n_train", "l2"}, percents over draws of labels.

    The mean over draws, their standard deviation, and the 95 % interval of the mean by Student's t: what other draws
    would give on these test images. "n_train" is of one draw, "l2" the median. There are no outcomes of images: their
    bootstrap would hold the draws fixed, and so leave out what matters most with few labels. Compare encoders draw by
    draw, by `drawn` and `mean_of_draws`. Raises UserError for missing or too few labels, RunError where features are
    not finite.
    """
    found = drawn(train, test, config)
    metrics: dict[str, float] = {}
    for name, values in found.metrics.items():
        metrics |= {**mean_of_draws(values).named(name), f"{name}_std": statistics.stdev(values)}
    metrics |= {"n_train": float(found.images), "l2": statistics.median_low(found.l2)}
    return Metrics(metrics)


def drawn(train: Features, test: Features, config: LogisticConfig) -> Draws:
    """Every draw by itself; raises as `logistic` does.

    `correct` averaged over draws is an outcome for each test image, of which `intervals.mean_interval` says what other
    test images would give with these draws.
    """
    (x, y), (x_test, y_test), classes = labelled_pair(train, test)
    metrics: dict[str, list[float]] = {}
    correct, strengths, rows = [], [], torch.empty(0)
    for number in range(config.draws):
        # A function of (seed, number, labels): the same images for every encoder, and fewer labels a part of more.
        rows = per_class(y, config.labels_per_class, seed=step_seed(config.seed, number, 0), classes=train.classes).to(
            x.device
        )
        l2 = config.l2 or chosen_l2(
            x[rows], y[rows], classes=classes, seed=config.seed, max_iterations=config.max_iterations
        )
        weight, bias = logistic_regression(
            x[rows].double(), y[rows], classes=classes, l2=l2, max_iterations=config.max_iterations, name="logistic"
        )
        scores = functional.linear(x_test, weight.to(x_test), bias.to(x_test))
        for name, value in accuracies(scores, y_test).items():
            metrics.setdefault(name, []).append(value)
        correct.append(scores.argmax(1) == y_test)
        strengths.append(l2)
    return Draws(metrics, torch.stack(correct).cpu(), strengths, len(rows))


def mean_of_draws(values: list[float], *, level: float = 0.95) -> Interval:
    """The mean of two values or more that were drawn independently, with Student's interval of it."""
    from scipy.stats import t  # type: ignore[import-untyped]

    mean = statistics.fmean(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, level)
