"""Linear classification of frozen, un-augmented features: by the paper's protocol, and solved to its optimum."""

from __future__ import annotations

import warnings

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.features import accuracies, labelled_pair
from mvmr.types import Features, Section, UserError

# Largest entry of the gradient, in the solver's round coordinates: at SOLVED it ends (float32 ends before, between 1e-5
# and 1e-4, where rounding hides any gain), above UNSOLVED it warns.
SOLVED, UNSOLVED = 1e-6, 1e-3


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

    l2: float = Field(default=10.0, gt=0)
    """Weight of |W|^2 / 2 beside the cross-entropy summed over the N images (scikit-learn's 1 / C): a prior, whose
    strength relative to the data falls as 1 / N. 10 is firm for ten labels a class and slight for thousands. The bias
    is free."""
    max_iterations: int = Field(default=500, ge=1)
    """L-BFGS iterations at most; a warning says when they did not suffice."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many images of each class; null: on all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of images."""


def linear(train: Features, test: Features, config: LinearConfig) -> dict[str, float]:
    """{"top1", "top5", "n_train"}: one layer trained by Adam on the features as they are; accuracy of the last epoch.

    The layer starts at zero: the problem is convex, so a drawn start would only add noise. Top5 is left out for five
    classes or fewer. Raises UserError for missing or too few labels, RunError when features are not finite.
    """
    (x, y), (x_test, y_test), classes = labelled_pair(train, test)
    generator = torch.Generator().manual_seed(config.seed)
    x, y = _some_labels(x, y, train.classes, config.labels_per_class, generator)
    weight, bias = adam_layer(x, y, classes=classes, config=config, generator=generator)
    return {**accuracies(functional.linear(x_test, weight, bias), y_test), "n_train": float(len(x))}


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


def linear_fast(train: Features, test: Features, config: LinearFastConfig) -> dict[str, float]:
    """{"top1", "top5", "n_train"}: multinomial logistic regression on standardised features, at its optimum.

    Mean and deviation are those of the images trained on; dimensions constant there are left out. Top5 is left out for
    five classes or fewer. Raises UserError for missing or too few labels, RunError when features are not finite.
    """
    (x, y), (x_test, y_test), classes = labelled_pair(train, test)
    generator = torch.Generator().manual_seed(config.seed)
    x, y = _some_labels(x, y, train.classes, config.labels_per_class, generator)
    weight, bias = standardised_regression(x, y, classes=classes, config=config)
    return {**accuracies(functional.linear(x_test, weight, bias), y_test), "n_train": float(len(x))}


def standardised_regression(x: Tensor, y: Tensor, *, classes: int, config: LinearFastConfig) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]), for features as they are, of the regression solved on standardised ones."""
    shift, scale = standardisation(x)
    weight, bias = logistic_regression(
        (x - shift) * scale, y, classes=classes, l2=config.l2 / len(x), max_iterations=config.max_iterations
    )
    weight = weight * scale
    return weight, bias - weight @ shift


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [D], 1 / deviation [D]) of features [N, D]; the second is 0 for a dimension constant but for rounding."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    constant = deviation <= 1e-6 * x.abs().amax(0)
    return mean, torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, deviation))


@torch.enable_grad()
def logistic_regression(
    x: Tensor, y: Tensor, *, classes: int, l2: float, max_iterations: int = 500
) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) of least mean cross-entropy + l2 |weight|^2 / 2 over features x [N, D], labels y [N].

    x should be centred and of unit scale. L-BFGS with strong Wolfe line search in the precision of x, until rounding
    leaves nothing to gain; warns when `max_iterations` come first.
    """
    basis, spread = _preconditioner(x, classes, l2)
    rotated = x @ (basis * spread)  # [N, D]
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, max_eval=4 * max_iterations, tolerance_grad=SOLVED,
        tolerance_change=0.0, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(functional.linear(rotated, weight, bias), y)
        value = value + 0.5 * l2 * (weight * spread).square().sum()
        value.backward()
        return value

    solver.step(objective)
    objective()  # the gradient where the solver stopped, not where its line search looked last
    left = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    if left > UNSOLVED:
        warnings.warn(
            f"linear_fast stopped short of its optimum (gradient {left:.1e}); raise linear_fast.max_iterations or l2",
            stacklevel=2,
        )
    return (weight.detach() * spread) @ basis.T, bias.detach()


def _preconditioner(x: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    # The Hessian at zero is, for each class, covariance * (1 - 1/C) / C + l2. Along its eigenvectors, each divided by
    # the root of its eigenvalue, the same optimum lies in a round bowl: tens of iterations instead of hundreds.
    variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double())  # [D], [D, D]
    curvature = variance.clamp_min(0) * (1 - 1 / classes) / classes + l2
    return basis.to(x), curvature.rsqrt().to(x)


def _some_labels(
    x: Tensor, y: Tensor, names: tuple[str, ...], per_class: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`per_class` images of every class, drawn without replacement, in data-set order; all for None.

    For one seed, fewer labels are a subset of more.
    """
    if per_class is None:
        return x, y
    order = torch.randperm(len(y), generator=generator).to(y.device)
    shuffled = y[order]
    chosen = []
    for label in range(len(names)) if names else y.unique().tolist():
        of_class = order[shuffled == label]
        if len(of_class) < per_class:
            raise UserError(
                f"labels_per_class={per_class}, but class {names[label] if names else label} has {len(of_class)} "
                "training images; take fewer labels, or leave labels_per_class out to train on all"
            )
        chosen.append(of_class[:per_class])
    kept = torch.cat(chosen).sort().values
    return x[kept], y[kept]
