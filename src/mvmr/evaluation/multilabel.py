"""Multi-label classification of frozen features: a linear classifier for each class, judged by average precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.average_precision import Definition, average_precision
from mvmr.evaluation.features import multi_labelled_pair
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.regularisation import standardisation
from mvmr.evaluation.roc import roc_auc
from mvmr.evaluation.svm import COSTS, svm_classes, unit_length
from mvmr.ops.random import permutation
from mvmr.types import Features, Section, UserError

L2_GRID = (1.0, 10.0, 100.0, 1e3, 1e4)
"""What `l2` is chosen from when it is not given."""
HELD_OUT = 0.2
"""Share of the training images on which it is chosen."""
# Largest entry of the gradient, in the solver's round coordinates and float64: at SOLVED it ends, above UNSOLVED it
# warns.
SOLVED, UNSOLVED = 1e-7, 1e-4


class MultilabelConfig(Section):
    """Settings of `multilabel`."""

    solver: Literal["fast", "svm", "adam"] = "fast"
    """fast: logistic regression on standardised features, at the optimum; svm: the usual protocol of VOC07, on features
    of unit length; adam: MV-MR's protocol, on the features as they are."""
    l2: float | None = Field(default=None, gt=0)
    """fast: weight of |w|^2 / 2 beside each class's cross-entropy summed over its images (scikit-learn's 1 / C); the
    bias is free. null: the one of 1, 10, 100, 1000 and 10000 with the best mean AP on a fifth of the training images,
    after training on the others."""
    costs: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=COSTS, min_length=1)
    """svm: what each class's cost is chosen from by cross-validation; one is taken as it is."""
    folds: int = Field(default=3, ge=2)
    """svm: of the cross-validation."""
    positive_weight: float = Field(default=2.0, gt=0)
    """svm: weight of the loss of images that show the class; others have 1."""
    unknown: Literal["left_out", "absent"] | None = None
    """What a label of -1 is in training: left_out, or absent; null: absent for svm, as its released code has it, else
    left_out. It is always left out in measuring."""
    max_iterations: int = Field(default=2000, ge=1)
    """fast and svm: iterations at most; a warning says when they did not suffice."""
    lr: float = Field(default=1e-4, gt=0)
    """adam: learning rate, constant (Section 7 of MV-MR's paper, of its linear evaluation)."""
    batch_size: int = Field(default=256, ge=1)
    """adam: features a step; an epoch's last batch may be smaller."""
    epochs: int = Field(default=100, ge=1)
    """adam: passes over the training features (Section 6.1, Transfer Learning); the last epoch counts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the held-out fifth and of adam's order."""


def multilabel(train: Features, test: Features, config: MultilabelConfig) -> Metrics:
    """{"map11", "map", "auc", "ap11/CLASS" ..., "n_train"}: linear classes on features, in percent.

    And with solver fast "l2", with svm "cost/CLASS" ..., with fast and adam "loss_first" and "loss_last", the mean
    cross-entropy of the training labels before and after training. "map11" is the mean over classes of VOC2007's
    11-point average precision, "map" of VOC2010's area, "auc" of the area under the ROC; the labels [N, C] are 1, 0, or
    -1, which does not count (nor train, see `unknown`). A class that no image of train or of test shows, or every one
    of train, is left out of the means, with a warning that names it; "auc" also leaves out what every image of test
    shows.
    Raises UserError when labels are missing or are one class an image, RunError when features are not finite.
    """
    (x, y), (x_test, y_test), names = multi_labelled_pair(train, test)
    if (config.unknown or ("absent" if config.solver == "svm" else "left_out")) == "absent":
        y = y.clamp_min(0)
    used = _usable(y, y_test)
    if not bool(used.any()):
        raise UserError("no class has images with and without it in train and one with it in test; take more images")
    if not bool(used.all()):
        missing = ", ".join(name for name, there in zip(names, used.tolist(), strict=True) if not there)
        warnings.warn(f"left out of the mean, for want of labelled images in train or test: {missing}", stacklevel=2)
    y, y_test = y[:, used], y_test[:, used]
    kept = [name for name, there in zip(names, used.tolist(), strict=True) if there]
    metrics: dict[str, float] = {}
    if config.solver == "adam":
        weight, bias = adam_classes(x, y, config)
        scores = functional.linear(x_test, weight, bias)  # [M, C]
        metrics |= {"loss_first": math.log(2.0), "loss_last": _cross_entropy(functional.linear(x, weight, bias), y)}
    elif config.solver == "svm":
        weight, bias, costs = svm_classes(
            unit_length(x), y, kept, costs=config.costs, folds=config.folds, positive_weight=config.positive_weight,
            max_iterations=config.max_iterations,
        )  # fmt: skip
        metrics |= {f"cost/{name}": cost for name, cost in zip(kept, costs.tolist(), strict=True)}
        scores = functional.linear(unit_length(x_test), weight, bias)
    else:
        metrics["l2"] = config.l2 or _chosen_l2(x, y, config)
        of_all = _scores_at(x, y, torch.cat([x, x_test]), (metrics["l2"],), config)[0]
        seen, scores = of_all[: len(x)], of_all[len(x) :]
        rates = (y == 1).sum(0) / (y >= 0).sum(0)  # where the search starts
        metrics |= {"loss_first": _cross_entropy(rates.logit().expand_as(y), y), "loss_last": _cross_entropy(seen, y)}
    ap11, ap = (100.0 * average_precision(scores, y_test, definition=kind) for kind in ("voc07", "all"))  # [C] each
    by_class = {f"ap11/{name}": value for name, value in zip(kept, ap11.tolist(), strict=True)}
    values = {"map11": ap11.mean().item(), "map": ap.mean().item(), "n_train": float(len(x)), **metrics, **by_class}
    auc = 100.0 * roc_auc(scores, y_test).nanmean().item()
    kinds: dict[str, Definition] = {"map11": "voc07", "map": "all"}
    statistics: dict[str, Callable[[Tensor], float]] = {
        name: partial(_mean_precision, scores.cpu(), y_test.cpu(), kind) for name, kind in kinds.items()
    }
    if not math.isnan(auc):
        values["auc"], statistics["auc"] = auc, partial(_mean_area, scores.cpu(), y_test.cpu())
    return Metrics(values, statistics=statistics, images=len(y_test))


def _cross_entropy(scores: Tensor, y: Tensor) -> float:
    """Mean over the labels [N, C] that are not left out."""
    known, target = (y >= 0).to(scores.dtype), (y == 1).to(scores.dtype)
    total = functional.binary_cross_entropy_with_logits(scores, target, weight=known, reduction="sum")
    return float(total / known.sum())


def _mean_precision(scores: Tensor, y: Tensor, definition: Definition, chosen: Tensor) -> float:
    """Mean AP in percent of some images, over the classes that they show: a resample may lack one."""
    return 100.0 * average_precision(scores[chosen], y[chosen], definition=definition).nanmean().item()


def _mean_area(scores: Tensor, y: Tensor, chosen: Tensor) -> float:
    """Mean area under the ROC in percent of some images, over the classes that they show and do not show."""
    return 100.0 * roc_auc(scores[chosen], y[chosen]).nanmean().item()


def _usable(y: Tensor, y_test: Tensor) -> Tensor:
    """[C] of the classes that can be learnt from labels y [N, C] and measured with y_test [M, C]."""
    return (y == 1).any(0) & (y == 0).any(0) & (y_test == 1).any(0)


def _chosen_l2(x: Tensor, y: Tensor, config: MultilabelConfig) -> float:
    """The strength of L2_GRID with the best mean AP (all recalls) on held-out images; of equal ones the strongest."""
    order = permutation(config.seed, 0, len(x)).to(x.device)
    held, rest = order[: round(HELD_OUT * len(x))], order[round(HELD_OUT * len(x)) :]
    used = _usable(y[rest], y[held])
    if not bool(used.any()):
        raise UserError(f"multilabel.l2: {len(x)} training images are too few to choose it; set it, for example to 100")
    grid = sorted(L2_GRID, reverse=True)
    scores = _scores_at(x[rest], y[rest][:, used], x[held], grid, config)
    values = [average_precision(part, y[held][:, used], definition="all").mean().item() for part in scores]
    return grid[values.index(max(values))]


def _scores_at(
    x: Tensor, y: Tensor, x_test: Tensor, strengths: Sequence[float], config: MultilabelConfig
) -> list[Tensor]:
    """Scores [M, C] of x_test [M, D] after training on x [N, D] and y [N, C], for each strength; standardised here."""
    x, x_test = x.double(), x_test.double()
    shift, scale = standardisation(x)
    x_test = (x_test - shift) * scale
    solved = one_vs_rest((x - shift) * scale, y, strengths, max_iterations=config.max_iterations)
    return [functional.linear(x_test, weight, bias) for weight, bias in solved]


def one_vs_rest(
    x: Tensor, y: Tensor, strengths: Sequence[float], *, max_iterations: int = 1000
) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight [C, D], bias [C]) for each strength: for each class by itself, the least cross-entropy summed over its
    images + strength |w|^2 / 2.

    x: [N, D] float64, centred and of unit scale. y: [N, C], 1, 0 or -1 (left out); every class needs a 1 and a 0. Each
    strength starts from the solution before it, so give falling ones. L-BFGS with strong Wolfe line search, all classes
    at once; warns when `max_iterations` end it.
    """
    variance, basis = torch.linalg.eigh(x.T @ x / len(x))  # [D], [D, D]
    rotated, known = x @ basis, y >= 0
    rate = (y == 1).sum(0) / known.sum(0).double()  # [C]
    # The Hessian of a class that predicts its rate is covariance * heaviness + l2, and heaviness for the bias: divided
    # by the roots of its eigenvalues, every class lies in a round bowl.
    heaviness = rate * (1 - rate) * known.sum(0) / len(x)
    weight = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    bias = torch.logit(rate)
    for strength in strengths:
        l2 = strength / len(x)
        spread = (heaviness[:, None] * variance.clamp_min(0) + l2).rsqrt()  # [C, D]
        start = torch.cat([weight / spread, (bias * heaviness.sqrt())[:, None]], 1)
        solution = _solve(rotated, y, start, spread, heaviness.rsqrt(), l2=l2, max_iterations=max_iterations)
        weight, bias = solution[:, :-1] * spread, solution[:, -1] * heaviness.rsqrt()
        yield weight @ basis.T, bias


@torch.enable_grad()
def _solve(
    x: Tensor, y: Tensor, start: Tensor, spread: Tensor, lift: Tensor, *, l2: float, max_iterations: int
) -> Tensor:
    """[C, D + 1], the weights / spread and the bias / lift at the optimum."""
    known = (y >= 0).to(x.dtype)
    target = (y == 1).to(x.dtype)
    solution = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [solution], max_iter=max_iterations, max_eval=4 * max_iterations, tolerance_grad=SOLVED,
        tolerance_change=0.0, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        weight = solution[:, :-1] * spread
        scores = functional.linear(x, weight, solution[:, -1] * lift)  # [N, C]
        value = functional.binary_cross_entropy_with_logits(scores, target, weight=known, reduction="sum") / len(x)
        value = value + 0.5 * l2 * weight.square().sum()
        value.backward()
        return value

    solver.step(objective)
    objective()  # the gradient where the solver stopped, not where its line search looked last
    left = math.nan if solution.grad is None else float(solution.grad.abs().max())
    if not left <= UNSOLVED:
        warnings.warn(
            f"multilabel stopped short of its optimum (gradient {left:.1e}); raise multilabel.max_iterations or l2",
            stacklevel=2,
        )
    return solution.detach()


@torch.enable_grad()
def adam_classes(x: Tensor, y: Tensor, config: MultilabelConfig) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]) after the last epoch of Adam, started from zero.

    The loss is binary cross-entropy, the mean over a batch's labels that are not left out.
    """
    generator = torch.Generator().manual_seed(config.seed)
    known, target = y >= 0, (y == 1).to(x.dtype)
    weight = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=config.lr)
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(x), generator=generator).to(x.device).split(config.batch_size):
            optimizer.zero_grad()
            scores = functional.linear(x[chosen], weight, bias)
            counted = known[chosen].to(x.dtype)
            loss = functional.binary_cross_entropy_with_logits(scores, target[chosen], weight=counted, reduction="sum")
            (loss / counted.sum().clamp_min(1.0)).backward()
            optimizer.step()
    return weight.detach(), bias.detach()
