"""Linear support vector machines on frozen features, one a class: the usual protocol on VOC07.

Goyal, Mahajan, Gupta, Misra, "Scaling and Benchmarking Self-Supervised Visual Representation Learning", ICCV 2019,
Section 6.1, with the numbers of its released code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

COSTS = tuple(sorted([10.0**power for power in range(-7, 3)] + [0.5**power for power in range(4, 20)]))
"""What each class's cost is chosen from: the released code's 26 values, 1e-7 to 100."""
UNCHOSEN = 1.0
"""The cost of a class that has one image with it, or one without: nothing can be held out."""


def unit_length(x: Tensor) -> Tensor:
    """Features [N, D] divided by their length + 1e-5, in float64, as the released code has them."""
    x = x.double()
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-5)


def svm_classes(
    x: Tensor,
    y: Tensor,
    names: Sequence[str],
    *,
    costs: Sequence[float] = COSTS,
    folds: int = 3,
    positive_weight: float = 2.0,
    max_iterations: int = 2000,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [C, D], bias [C], cost [C]) float64 of the least |w|^2 / 2 + b^2 / 2 + cost sum_i c_i h_i^2, class by
    class.

    h_i = max(0, 1 - s_i (w x_i + b)), s_i = 1 or -1; c_i is `positive_weight` for images that show the class, else 1.
    LIBLINEAR solves it, and holds the bias small too. x: [N, D]; y: [N, C], 1, 0 or -1 (left out); every class needs a
    1 and a 0. A class's cost is the one with the best average precision (scikit-learn's) in `folds`-fold stratified
    cross-validation, the smaller of equal ones; with fewer images on one side, in as many folds. Warns where there is
    one image on a side, and where `max_iterations` end a search. Classes are solved in as many threads as torch has.
    """
    from sklearn.exceptions import ConvergenceWarning

    def of_class(labels: Tensor) -> tuple[np.ndarray, float, float, bool, bool]:
        known = labels >= 0
        own, target = x[known].double().numpy(), labels[known].numpy()
        parts = min(folds, int(target.sum()), int((1 - target).sum()))
        cost = _chosen(own, target, sorted(costs), parts, positive_weight, max_iterations)
        machine = _machine(cost, positive_weight, max_iterations).fit(own, target)
        finished = int(np.max(machine.n_iter_)) < max_iterations
        return machine.coef_[0], machine.intercept_[0], cost, finished, len(costs) == 1 or parts > 1

    device, x = x.device, x.cpu()
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)  # it does not name the class
        solved = list(pool.map(of_class, y.cpu().T))
    unfinished = [name for name, of in zip(names, solved, strict=True) if not of[3]]
    unchosen = [name for name, of in zip(names, solved, strict=True) if not of[4]]
    if unchosen:
        warnings.warn(
            f"multilabel: one image with or without it, so its cost is {UNCHOSEN:g}, not chosen: {', '.join(unchosen)}",
            stacklevel=2,
        )
    if unfinished:
        warnings.warn(
            f"multilabel stopped short of its optimum for {', '.join(unfinished)}; raise multilabel.max_iterations or "
            "give smaller multilabel.costs",
            stacklevel=2,
        )
    weight, bias, chosen = (torch.from_numpy(np.array([of[k] for of in solved])).to(device) for k in range(3))
    return weight, bias, chosen


def _chosen(
    x: np.ndarray, y: np.ndarray, costs: Sequence[float], parts: int, positive_weight: float, max_iterations: int
) -> float:
    if len(costs) == 1:
        return costs[0]
    if parts < 2:
        return UNCHOSEN
    from sklearn.model_selection import cross_val_score

    means = [
        cross_val_score(_machine(cost, positive_weight, max_iterations), x, y, cv=parts, scoring="average_precision")
        for cost in costs
    ]
    return costs[int(np.argmax(np.mean(means, axis=1)))]


def _machine(cost: float, positive_weight: float, max_iterations: int):  # type: ignore[no-untyped-def]
    from sklearn.svm import LinearSVC

    # The released code solves the dual problem, which takes thousands of steps at a large cost, and is ended before its
    # optimum there; the primal one takes tens.
    return LinearSVC(
        C=cost, class_weight={1: positive_weight, 0: 1.0}, tol=1e-4, dual=False, max_iter=max_iterations,
    )  # fmt: skip
