"""Multinomial logistic regression at its optimum, and the strength of its regularisation, chosen on held-out images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.ops.precision import full_float32
from mvmr.ops.random import permutation

STRENGTHS = (1e5, 1e4, 1e3, 100.0, 10.0, 1.0, 0.1)
"""What `chosen_l2` chooses from, weights of |W|^2 / 2 beside the cross-entropy summed over the images."""
UNCHOSEN = 10.0
"""What it returns where no class has two images, so that none can be held out; and what the online head takes."""
PARTS = 5
"""Equal parts of the training images, held out one after another ..."""
ENOUGH = 2000
"""... until so many images have been judged: all parts of few images, one part of many."""
CHOICE_EPOCH = 0xFFFFFFFE
"""The epoch of the shuffle behind the parts: no run reaches it."""
ABSENT = -1e4
"""Bias of a class without training images, whose optimum is minus infinity."""
# Largest entry of the gradient in the solver's round coordinates. In float32 rounding may end the search at 1e-4.
COARSE, SOLVED_32, SOLVED_64, UNSOLVED = 1e-3, 1e-5, 1e-7, 1e-3


def chosen_l2(
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    max_iterations: int = 500,
) -> float:
    """The strength whose regression on the other images gives held-out ones the least cross-entropy.

    x: [N, D] features as they are, y: [N] int64 in 0 ... classes - 1, training images alone. A fifth of the images, in
    the proportions of the classes, is held out at a time, and features are standardised by the others; all fifths in
    turn where they are few (cross-validation), one where N is 10,000 or more. Images that are their class's only one
    are never held out. Of equal strengths the largest. Held-out accuracy would be the poorer guide: with few labels it
    moves by whole images. A pure function of its arguments.
    """
    ordered = sorted(strengths, reverse=True)
    losses = held_out_losses(x, y, classes=classes, strengths=ordered, seed=seed, max_iterations=max_iterations)
    return UNCHOSEN if losses is None else ordered[int(losses.argmin())]


def held_out_losses(
    x: Tensor, y: Tensor, *, classes: int, strengths: Sequence[float], seed: int, max_iterations: int = 500
) -> Tensor | None:
    """[S] float64, the mean cross-entropy of held-out images for each of the falling strengths; None without any."""
    part, judged = parts_of(y, seed).to(x.device), 0
    losses = torch.zeros(len(strengths), dtype=torch.float64)
    for number in range(PARTS):
        held = part == number
        if not bool(held.any()) or judged >= ENOUGH:
            continue
        judged += int(held.sum())
        found = regressions(
            x[~held], y[~held], classes=classes, strengths=strengths, tolerance=COARSE, max_iterations=max_iterations
        )
        for place, (weight, bias) in enumerate(found):
            scores = functional.linear(x[held], weight, bias)
            losses[place] += functional.cross_entropy(scores, y[held], reduction="sum").double().cpu()
    return losses / judged if judged else None


def parts_of(y: Tensor, seed: int) -> Tensor:
    """The part 0 ... 4 in which each image of labels y [N] is held out, or -1: [N] int64 on the CPU.

    Shuffled images are dealt out class by class, so that parts and the classes in them differ by one image at most.
    """
    order = permutation(seed, CHOICE_EPOCH, len(y))
    order = order[y.cpu()[order].argsort(stable=True)]
    _, place, counts = y.cpu().unique(return_inverse=True, return_counts=True)
    order = order[counts[place[order]] > 1]
    part = torch.full((len(y),), -1)
    part[order] = torch.arange(len(order)) % PARTS
    return part


def logistic_regression(
    x: Tensor, y: Tensor, *, classes: int, l2: float, max_iterations: int = 500, name: str = "linear_fast"
) -> tuple[Tensor, Tensor]:
    """(weight [C, D], bias [C]), for features as they are, of the optimum on standardised ones.

    Least cross-entropy summed over the images x [N, D] with labels y [N] + l2 |W|^2 / 2, the bias free (scikit-learn's
    C is 1 / l2), in the precision of x. Warns when `max_iterations` of L-BFGS come first, in the name of an evaluation.
    """
    tolerance = SOLVED_64 if x.dtype == torch.float64 else SOLVED_32
    return regressions(
        x, y, classes=classes, strengths=(l2,), tolerance=tolerance, max_iterations=max_iterations, name=name
    )[0]


@torch.no_grad()
def regressions(
    x: Tensor,
    y: Tensor,
    *,
    classes: int,
    strengths: Sequence[float],
    tolerance: float,
    max_iterations: int = 500,
    name: str = "",
) -> list[tuple[Tensor, Tensor]]:
    """What `logistic_regression` gives, for each strength; each starts from the one before, so give falling ones.

    tolerance: of the gradient, in the solver's coordinates. Without a name, nothing warns.
    """
    found, device = [], x.device.type
    present, labels = y.unique(return_inverse=True)
    with torch.autocast(device, enabled=False), full_float32(device):
        shift, scale = standardisation(x)
        standard = (x - shift) * scale
        variance, basis = _axes(standard)
        rotated = torch.cat([standard @ basis, x.new_ones(len(x), 1)], 1)  # [N, r + 1]
        del standard  # as large as x
        point = x.new_zeros(len(present), len(variance) + 1)
        for strength in strengths:
            l2 = strength / len(x)
            # Twice, because where the first solution lies says how round the bowl is there.
            for limit in (COARSE, tolerance) if tolerance < COARSE else (tolerance,):
                point, left = _descended(
                    rotated, labels, point, variance, l2=l2, tolerance=limit, iterations=max_iterations
                )
            if name and not left <= UNSOLVED:
                warnings.warn(
                    f"{name} stopped short of its optimum (gradient {left:.1e}); raise {name}.max_iterations or "
                    f"{name}.l2",
                    stacklevel=3,
                )
            weight, bias = x.new_zeros(classes, x.shape[1]), x.new_full((classes,), ABSENT)
            centred = point - point.mean(0)  # softmax leaves the classes' mean open, and the penalty wants it 0
            weight[present] = (centred[:, :-1] @ basis.T) * scale
            bias[present] = centred[:, -1] - weight[present] @ shift
            found.append((weight, bias))
    return found


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [D], 1 / deviation [D]) of features [N, D]; the second is 0 for a dimension constant but for rounding."""
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    constant = deviation <= 1e-6 * x.abs().amax(0)
    return mean, torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, deviation))


def _axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Principal variances [r] and directions [D, r] of centred x [N, D]; only those that vary where N < D.

    Nothing is lost: the weights of the optimum lie in the span of the images.
    """
    if len(x) >= x.shape[1]:
        variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double())
        return variance.clamp_min(0).to(x), basis.to(x)
    wide = x.double()
    variance, images = torch.linalg.eigh(wide @ wide.T / len(x))  # [N], [N, N]
    kept = variance > 1e-12 * variance[-1]
    variance = variance[kept]
    return variance.to(x), (wide.T @ images[:, kept] / (len(x) * variance).sqrt()).to(x)


def _descended(
    x: Tensor, y: Tensor, point: Tensor, variance: Tensor, *, l2: float, tolerance: float, iterations: int
) -> tuple[Tensor, float]:
    """L-BFGS with strong Wolfe line search from `point` [C, r + 1]: where it ends, and the gradient's largest entry.

    x: [N, r + 1], the last column 1, so that a point's last column is the bias.
    """
    p = (point @ x.T).softmax(0)  # [C, N]
    heaviness = (p * (1 - p)).mean(1, keepdim=True).clamp_min(1e-4)  # [C, 1]
    # The Hessian of a class by itself is about heaviness * covariance + l2, and heaviness for the bias. Divided by the
    # roots of its eigenvalues, the bowl is round: tens of iterations instead of hundreds.
    stretch = torch.cat([heaviness * variance + l2, heaviness], 1).rsqrt()  # [C, r + 1]
    penalty = torch.full_like(point, l2)
    penalty[:, -1] = 0
    solution = point / stretch
    solver = torch.optim.LBFGS(
        [solution], max_iter=iterations, max_eval=4 * iterations, tolerance_grad=tolerance, tolerance_change=0.0,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        # By hand, because autograd's product for the weights costs ten times this one on a CPU.
        now = solution * stretch
        scores = (now @ x.T).log_softmax(0)  # [C, N]
        value = 0.5 * (penalty * now.square()).sum() - scores.gather(0, y[None]).mean()
        error = scores.exp_().scatter_add_(0, y[None], scores.new_full((1, len(y)), -1.0)).div_(len(y))
        solution.grad = (error @ x + penalty * now) * stretch
        return value

    solver.step(objective)
    objective()  # the gradient where the solver stopped, not where its line search looked last
    assert solution.grad is not None
    return solution * stretch, float(solution.grad.abs().max())
