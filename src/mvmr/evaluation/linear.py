"""Linear classification of frozen, un-augmented features: by the paper's protocol, and solved to its optimum."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.data.label_subsets import per_class
from mvmr.evaluation.features import accuracies, labelled_pair
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.regularisation import chosen_l2, logistic_regression
from mvmr.types import Features, Section


class LinearConfig(Section):
    """Settings of `linear`; the defaults are the protocol of MV-MR's paper (Section 7)."""

    lr: float = Field(default=1e-4, gt=0)
    """Adam's learning rate, constant."""
    batch_size: int = Field(default=256, ge=1)
    """Features a step; an epoch's last batch may be smaller."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the training features; the last epoch counts, never the best."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many images of each class; null: on all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order and of the choice of images."""


class LinearFastConfig(Section):
    """Settings of `linear_fast`."""

    l2: float | None = Field(default=None, gt=0)
    """Weight of |W|^2 / 2 beside the cross-entropy summed over the images (scikit-learn's 1 / C); the bias is free.
    null: the one of 0.1, 1, 10, 100, 1000, 10^4 and 10^5 with the least cross-entropy on held-out training images; 10
    where no class has two."""
    max_iterations: int = Field(default=500, ge=1)
    """L-BFGS iterations at most; a warning says when they did not suffice."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many images of each class; null: on all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of images, and of those held out to choose l2."""


def linear(train: Features, test: Features, config: LinearConfig) -> Metrics:
    """{"top1", "top5", "n_train"}: one layer trained by Adam on the features as they are; accuracy of the last epoch.

    The layer starts at zero: the problem is convex, so a drawn start would only add noise. Top5 is left out for five
    classes or fewer. Raises UserError for missing or too few labels, RunError when features are not finite.
    """
    (x, y), (x_test, y_test), classes = labelled_pair(train, test)
    generator = torch.Generator().manual_seed(config.seed)
    x, y = _some_labels(x, y, train.classes, config)
    weight, bias = adam_layer(x, y, classes=classes, config=config, generator=generator)
    return accuracies(functional.linear(x_test, weight, bias), y_test).also(n_train=float(len(x)))


@torch.enable_grad()
def adam_layer(
    x: Tensor, y: Tensor, *, classes: int, config: LinearConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) after the last epoch of Adam on the mean cross-entropy, started from zero."""
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=config.lr)
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(x), generator=generator).to(x.device).split(config.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(functional.linear(x[chosen], weight, bias), y[chosen]).backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def linear_fast(train: Features, test: Features, config: LinearFastConfig) -> Metrics:
    """{"top1", "top5", "n_train", "l2"}: multinomial logistic regression on standardised features, at its optimum.

    Mean and deviation are those of the images trained on; dimensions constant there are left out. Top5 is left out for
    five classes or fewer. Raises UserError for missing or too few labels, RunError when features are not finite.
    """
    (x, y), (x_test, y_test), classes = labelled_pair(train, test)
    x, y = _some_labels(x, y, train.classes, config)
    l2 = config.l2 or chosen_l2(x, y, classes=classes, seed=config.seed, max_iterations=config.max_iterations)
    weight, bias = logistic_regression(x, y, classes=classes, l2=l2, max_iterations=config.max_iterations)
    return accuracies(functional.linear(x_test, weight, bias), y_test).also(n_train=float(len(x)), l2=l2)


def _some_labels(
    x: Tensor, y: Tensor, names: tuple[str, ...], config: LinearConfig | LinearFastConfig
) -> tuple[Tensor, Tensor]:
    """The images that `config` trains on: n of every class, or all."""
    if config.labels_per_class is None:
        return x, y
    kept = per_class(y, config.labels_per_class, seed=config.seed, classes=names).to(y.device)
    return x[kept], y[kept]
