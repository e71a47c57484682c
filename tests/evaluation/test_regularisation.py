"""Logistic regression and its chosen strength against scikit-learn over the same grid, and what the choice may see."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation import regularisation as module
from mvmr.evaluation.regularisation import (
    ABSENT,
    PARTS,
    STRENGTHS,
    UNCHOSEN,
    chosen_l2,
    held_out_losses,
    logistic_regression,
    parts_of,
    regressions,
)


def digits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data, dtype=dtype), torch.tensor(found.target)


@cache
def overlapping(count: int, width: int = 30, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Correlated features of five classes that no plane separates."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (count,), generator=generator)
    latent = torch.randn(count, 8, generator=generator, dtype=torch.float64) + torch.eye(5, 8, dtype=torch.float64)[y]
    mixing = torch.randn(8, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return latent @ mixing + torch.randn(count, width, generator=generator, dtype=torch.float64), y


def of_scikit(x: Tensor, y: Tensor, l2: float) -> Any:
    scaler = StandardScaler().fit(x.numpy())
    model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=20_000).fit(scaler.transform(x.numpy()), y.numpy())
    return lambda others: model.predict_proba(scaler.transform(others.numpy()))


CASES = {
    "overlapping": (overlapping(600), overlapping(400, seed=2)),
    "digits": tuple((digits()[0][rows], digits()[1][rows]) for rows in (slice(600), slice(600, 900))),
    "more dimensions than images": (overlapping(40, 90), overlapping(400, 90, seed=2)),
}


@pytest.mark.parametrize("l2", [0.1, 10.0, 1e4])
@pytest.mark.parametrize("case", CASES)
def test_the_optimum_is_scikit_learns(case: str, l2: float) -> None:
    (x, y), (x_test, _) = CASES[case]
    expected = of_scikit(x, y, l2)(x_test)
    weight, bias = logistic_regression(x, y, classes=int(y.max()) + 1, l2=l2)
    found = functional.linear(x_test, weight, bias).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    single = logistic_regression(x.float(), y, classes=int(y.max()) + 1, l2=l2)
    found = functional.linear(x_test.float(), *single).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-2)


def test_a_path_is_its_single_solutions() -> None:
    x, y = overlapping(300)
    path = regressions(x, y, classes=5, strengths=(100.0, 1.0), tolerance=1e-7)
    for l2, (weight, bias) in zip((100.0, 1.0), path, strict=True):
        alone = functional.linear(x, *logistic_regression(x, y, classes=5, l2=l2))
        torch.testing.assert_close(functional.linear(x, weight, bias), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_zero_at_the_solution(dtype: torch.dtype) -> None:
    x, y = overlapping(1500)
    x = ((x - x.mean(0)) / x.std(0, correction=0)).to(dtype)
    weight, bias = logistic_regression(x, y, classes=5, l2=1.5)
    error = (functional.linear(x, weight, bias).softmax(1) - functional.one_hot(y, 5)) / len(x)
    limit = 2e-4 if dtype == torch.float32 else 1e-6
    assert (error.T @ x + 1e-3 * weight).abs().max() < limit
    assert error.sum(0).abs().max() < limit


@pytest.mark.parametrize(("data", "count"), [("digits", 200), ("overlapping", 250), ("overlapping", 30)])
def test_the_choice_is_scikit_learns_over_the_same_grid(data: str, count: int) -> None:
    x, y = (part[:count] for part in (digits() if data == "digits" else overlapping(count)))
    classes, part = int(y.max()) + 1, parts_of(y, 3)
    totals = []
    for l2 in STRENGTHS:
        total = 0.0
        for number in range(PARTS):
            held = part == number
            predicted = of_scikit(x[~held], y[~held], l2)(x[held])
            total += log_loss(y[held].numpy(), predicted, labels=range(classes), normalize=False)
        totals.append(total / int((part >= 0).sum()))
    losses = held_out_losses(x, y, classes=classes, strengths=STRENGTHS, seed=3)
    assert losses is not None
    # The choice solves less exactly, which shows in weights that are nearly free.
    assert losses.tolist() == pytest.approx(totals, rel=0.05)
    assert losses[:-2].tolist() == pytest.approx(totals[:-2], rel=5e-3)
    best = STRENGTHS[int(np.argmin(totals))]
    assert chosen_l2(x, y, classes=classes, seed=3) == best
    assert best < STRENGTHS[0]


def test_more_noise_takes_a_firmer_hand() -> None:
    x, y = overlapping(400)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 30, generator=generator, dtype=torch.float64)
    assert chosen_l2(x + 100 * noise, y, classes=5) > chosen_l2(x, y, classes=5)
    guess = torch.randint(0, 5, (400,), generator=generator)
    assert chosen_l2(x, guess, classes=5) == max(STRENGTHS)
    assert chosen_l2(x, y, classes=5, strengths=(0.1, 3.0)) == 3.0


def test_parts_are_even_in_size_and_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0]), 203, replacement=True, generator=generator) * 2
    part = parts_of(y, 0)
    assert part.min() == 0
    sizes = part.bincount(minlength=PARTS)
    assert sizes.max() - sizes.min() <= 1
    for label in y.unique():
        of_class = part[y == label].bincount(minlength=PARTS)
        assert of_class.max() - of_class.min() <= 1
    assert torch.equal(parts_of(y, 0), part)
    assert not torch.equal(parts_of(y, 1), part)


def test_a_class_is_never_held_out_whole() -> None:
    y = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    for seed in range(20):
        part = parts_of(y, seed)
        assert (part[y == 0] == -1).all()
        assert (part[y == 3] == -1).all()
        assert (part[(y == 1) | (y == 2)] >= 0).all()
        for number in range(PARTS):
            assert set(y[part != number].tolist()) == {0, 1, 2, 3}
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert chosen_l2(x, y, classes=4) in STRENGTHS
    alone = torch.arange(7)
    assert held_out_losses(x, alone, classes=7, strengths=STRENGTHS, seed=0) is None
    assert chosen_l2(x, alone, classes=7) == UNCHOSEN


@pytest.mark.parametrize(("enough", "parts"), [(1, 1), (60, 1), (61, 2), (10_000, 5)])
def test_parts_are_held_out_until_enough_are_judged(enough: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = overlapping(300)
    rows: list[int] = []
    solve = module.regressions

    def watched(x: Tensor, *others: Any, **settings: Any) -> Any:
        rows.append(len(x))
        return solve(x, *others, **settings)

    monkeypatch.setattr(module, "regressions", watched)
    monkeypatch.setattr(module, "ENOUGH", enough)
    losses = held_out_losses(x, y, classes=5, strengths=(10.0, 1.0), seed=0)
    assert losses is not None
    assert rows == [240] * parts
    assert 0.3 < losses[0] < 1.6


def test_classes_without_images_are_never_named() -> None:
    x, y = overlapping(200)
    weight, bias = logistic_regression(x, y * 2, classes=11, l2=1.0)
    plain = logistic_regression(x, y, classes=5, l2=1.0)
    torch.testing.assert_close(weight[:10:2], plain[0])
    torch.testing.assert_close(bias[:10:2], plain[1])
    assert (bias[[1, 3, 5, 7, 9, 10]] == ABSENT).all()
    assert set(functional.linear(x, weight, bias).argmax(1).tolist()) <= {0, 2, 4, 6, 8}


def test_shift_and_scale_of_features_change_nothing() -> None:
    x, y = overlapping(200)
    factor, offset = torch.logspace(-3, 3, 30, dtype=torch.float64), torch.linspace(-5, 5, 30, dtype=torch.float64)
    moved = x * factor + offset
    losses = held_out_losses(x, y, classes=5, strengths=STRENGTHS, seed=0)
    torch.testing.assert_close(held_out_losses(moved, y, classes=5, strengths=STRENGTHS, seed=0), losses)
    weight, bias = logistic_regression(x, y, classes=5, l2=10.0)
    other = logistic_regression(moved, y, classes=5, l2=10.0)
    torch.testing.assert_close(functional.linear(moved, *other), functional.linear(x, weight, bias), rtol=0, atol=1e-5)
    constant = torch.cat([x, torch.full((200, 1), 3.7, dtype=torch.float64)], 1)
    padded = logistic_regression(constant, y, classes=5, l2=10.0)
    assert (padded[0][:, -1] == 0).all()
    torch.testing.assert_close(padded[0][:, :-1], weight)


def test_the_choice_depends_on_its_arguments_alone() -> None:
    x, y = overlapping(150)
    with torch.no_grad():
        torch.manual_seed(0)
        first = held_out_losses(x, y, classes=5, strengths=STRENGTHS, seed=0)
        torch.manual_seed(1)
        assert torch.equal(held_out_losses(x, y, classes=5, strengths=STRENGTHS, seed=0), first)
    assert not torch.equal(held_out_losses(x, y, classes=5, strengths=STRENGTHS, seed=1), first)


def test_a_solver_cut_short_says_so_in_the_evaluations_name() -> None:
    x, y = digits(torch.float32)
    with pytest.warns(UserWarning, match=r"linear_fast stopped short.*linear_fast\.max_iterations or linear_fast\.l2"):
        logistic_regression(x, y, classes=10, l2=1e-3, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logistic_regression(x, y, classes=10, l2=10.0)
        held_out_losses(x[:100], y[:100], classes=10, strengths=(1e-3,), seed=0, max_iterations=1)


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    x, y = overlapping(400)
    losses = held_out_losses(x.cuda(), y.cuda(), classes=5, strengths=STRENGTHS, seed=0)
    torch.testing.assert_close(losses, held_out_losses(x, y, classes=5, strengths=STRENGTHS, seed=0))
    weight, _ = logistic_regression(x.cuda(), y.cuda(), classes=5, l2=1.0)
    torch.testing.assert_close(weight.cpu(), logistic_regression(x, y, classes=5, l2=1.0)[0], rtol=0, atol=1e-5)
