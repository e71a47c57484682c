"""Cross-correlation and covariance against slow loops, numpy, limits, invariances, and the gradient on two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvmr.losses.decorrelation import covariance_penalty, cross_correlation
from mvmr.ops.collectives import gather, rank
from ranks import averaged_gradients, run_on_ranks

# Fewer images than dimensions by more than half takes [B, B] matrices, the others take a [D, D] one.
SHAPES = pytest.mark.parametrize(("rows", "columns"), [(4, 9), (5, 10), (5, 9), (12, 5), (7, 7), (3, 1)])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def views(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two correlated embeddings with columns of unequal mean and scale."""
    z = normal(rows, columns) * torch.linspace(0.3, 2, columns) + torch.linspace(-1, 3, columns)
    return z.to(dtype), (z + 0.5 * normal(rows, columns, seed=1)).to(dtype)


def slow_correlation(z1: Tensor, z2: Tensor, i: int, j: int, epsilon: float) -> float:
    """Barlow Twins Eq. 2, element i, j, for columns that need not be centred."""
    n = len(z1)
    means = [sum(float(z[b, k]) for b in range(n)) / n for z, k in ((z1, i), (z2, j))]
    product = squares1 = squares2 = 0.0
    for b in range(n):
        a1, a2 = float(z1[b, i]) - means[0], float(z2[b, j]) - means[1]
        product, squares1, squares2 = product + a1 * a2, squares1 + a1**2, squares2 + a2**2
    return product / math.sqrt((squares1 + n * epsilon) * (squares2 + n * epsilon))


def slow_covariance(z: Tensor, i: int, j: int) -> float:
    """VICReg Eq. 3, element i, j."""
    n = len(z)
    means = [sum(float(z[b, k]) for b in range(n)) / n for k in (i, j)]
    return sum((float(z[b, i]) - means[0]) * (float(z[b, j]) - means[1]) for b in range(n)) / (n - 1)


@SHAPES
@pytest.mark.parametrize("epsilon", [1e-5, 0.0, 0.1])
def test_cross_correlation_equals_slow_loop(rows: int, columns: int, epsilon: float) -> None:
    z1, z2 = views(rows, columns)
    c = [[slow_correlation(z1, z2, i, j, epsilon) for j in range(columns)] for i in range(columns)]
    off = sum(c[i][j] ** 2 for i in range(columns) for j in range(columns) if i != j)
    diagonal, found = cross_correlation(z1, z2, epsilon=epsilon)
    assert diagonal.tolist() == pytest.approx([c[i][i] for i in range(columns)], abs=1e-10)
    assert found.item() == pytest.approx(off, abs=1e-10)


@SHAPES
def test_covariance_penalty_equals_slow_loop(rows: int, columns: int) -> None:
    z = views(rows, columns)[0]
    pairs = [(i, j) for i in range(columns) for j in range(columns) if i != j]
    expected = sum(slow_covariance(z, i, j) ** 2 for i, j in pairs) / columns  # Eq. 4
    assert covariance_penalty(z).item() == pytest.approx(expected, abs=1e-10)


@SHAPES
def test_equal_numpy(rows: int, columns: int) -> None:
    z1, z2 = views(rows, columns)
    cross = np.corrcoef(z1.numpy(), z2.numpy(), rowvar=False)[:columns, columns:]
    diagonal, off = cross_correlation(z1, z2, epsilon=0.0)
    np.testing.assert_allclose(diagonal.numpy(), cross.diagonal(), atol=1e-10)
    assert off.item() == pytest.approx(np.square(cross).sum() - np.square(cross.diagonal()).sum(), abs=1e-10)
    covariance = np.atleast_2d(np.cov(z1.numpy(), rowvar=False))
    expected = (np.square(covariance).sum() - np.square(covariance.diagonal()).sum()) / columns
    assert covariance_penalty(z1).item() == pytest.approx(expected, abs=1e-10)


def test_whitened_identical_views_cost_nothing() -> None:
    z = normal(24, 6)
    white = torch.linalg.qr(z - z.mean(0)).Q * 23**0.5  # covariance I
    diagonal, off = cross_correlation(white, white, epsilon=0.0)
    torch.testing.assert_close(diagonal, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert off.item() == pytest.approx(0, abs=1e-20)
    assert covariance_penalty(white).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(("rows", "columns"), [(400, 60), (60, 400)])
def test_independent_embeddings(rows: int, columns: int) -> None:
    """Every correlation of independent columns is 0 on average, and its square 1 / (B - 1), exactly."""
    seeds = range(8)
    parts = [cross_correlation(normal(rows, columns, seed=2 * s), normal(rows, columns, seed=2 * s + 1)) for s in seeds]
    expected = columns * (columns - 1) / (rows - 1)
    assert sum(off.item() for _, off in parts) / 8 == pytest.approx(expected, rel=0.02)
    on = sum((1 - diagonal).square().sum().item() for diagonal, _ in parts) / 8
    assert on == pytest.approx(columns, rel=0.05)
    found = sum(covariance_penalty(normal(rows, columns, seed=s)).item() for s in seeds) / 8
    assert found == pytest.approx((columns - 1) / (rows - 1), rel=0.02)


@pytest.mark.parametrize(("rows", "columns"), [(5, 12), (12, 5)])
def test_invariances(rows: int, columns: int) -> None:
    z1, z2 = views(rows, columns)
    diagonal, off = cross_correlation(z1, z2, epsilon=0.0)
    images, dimensions = torch.randperm(rows), torch.randperm(columns)
    scale, shift = torch.rand(columns, dtype=torch.float64) + 0.5, normal(columns, seed=5)
    for name, a, b in [
        ("the views exchanged", z2, z1),
        ("images permuted", z1[images], z2[images]),
        ("columns scaled and shifted", scale * z1 + shift, z2 / scale - shift),
    ]:
        found = cross_correlation(a, b, epsilon=0.0)
        torch.testing.assert_close(found, (diagonal, off), rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    found, same = cross_correlation(z1[:, dimensions], z2[:, dimensions], epsilon=0.0)
    torch.testing.assert_close((found, same), (diagonal[dimensions], off))
    assert cross_correlation(z1[images], z2, epsilon=0.0)[1].item() != pytest.approx(off.item(), rel=1e-3)

    penalty = covariance_penalty(z1)
    for z in (z1[images], z1[:, dimensions], z1 + shift, -z1):
        torch.testing.assert_close(covariance_penalty(z), penalty)
    torch.testing.assert_close(covariance_penalty(2 * z1), 16 * penalty)


def test_fewer_images_than_dimensions_cannot_be_decorrelated() -> None:
    """C has at most rank B - 1, so that with c_ii = 1 the rest is at least D^2 / (B - 1) - D."""
    z = normal(4, 12)
    diagonal, off = cross_correlation(z, z, epsilon=0.0)
    assert diagonal.min().item() == pytest.approx(1, abs=1e-12)
    assert off.item() >= 12**2 / 3 - 12
    halves = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64).repeat(1, 4)
    assert cross_correlation(halves, halves, epsilon=0.0)[1].item() == pytest.approx(12**2 / 3 - 12, abs=1e-10)


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (5, 3)])
def test_gradcheck(rows: int, columns: int) -> None:
    z1, z2 = (z.requires_grad_() for z in views(rows, columns))
    assert torch.autograd.gradcheck(lambda a, b: cross_correlation(a, b, epsilon=1e-2), (z1, z2))
    assert torch.autograd.gradcheck(covariance_penalty, z1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_columns_have_the_correlation_0_and_finite_gradients(dtype: torch.dtype) -> None:
    z1, z2 = views(8, 3, dtype)
    z1[:, 1] = 0.3  # a mean that rounds
    z1.requires_grad_()
    diagonal, off = cross_correlation(z1, z2)
    assert diagonal[1].item() == pytest.approx(0, abs=1e-4)
    (diagonal.sum() + off + covariance_penalty(z1)).backward()
    assert z1.grad is not None
    assert z1.grad.isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(64, 2048), (256, 128)])
def test_float32_keeps_its_digits(rows: int, columns: int) -> None:
    """Also far from the origin, and where the views are nearly equal."""
    z = normal(rows, columns)
    pair = [z + 30, z + 0.1 * normal(rows, columns, seed=1) + 30]
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        z1, z2 = (x.float().to(dtype).requires_grad_() for x in pair)
        diagonal, off = cross_correlation(z1, z2)
        penalty = covariance_penalty(z1)
        values.append([diagonal.sum().item(), off.item(), penalty.item()])
        gradients.append(torch.autograd.grad(off + penalty, (z1, z2)))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for found, exact in zip(*gradients, strict=True):
        assert (found - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (64, 16)])
def test_half_precision_is_computed_in_float32(rows: int, columns: int, dtype: torch.dtype) -> None:
    z1, z2 = (z * 300 for z in views(rows, columns, dtype))  # variances near 90,000 overflow float16
    with torch.autocast("cpu", dtype=dtype):
        (diagonal, off), penalty = cross_correlation(z1, z2), covariance_penalty(z1)
    exact = (*cross_correlation(z1.double(), z2.double()), covariance_penalty(z1.double()))
    for found, reference in zip((diagonal, off, penalty), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)


def test_refuses() -> None:
    z = normal(4, 3)
    for other in (z[:, :2], z[:1], z[0]):
        with pytest.raises(ValueError, match=r"two \[B, D\] embeddings"):
            cross_correlation(z, other)
    with pytest.raises(ValueError, match="B >= 2"):
        cross_correlation(z[:1], z[:1])
    with pytest.raises(ValueError, match="B >= 2"):
        covariance_penalty(z[:1])


def gathered(z1: Tensor, z2: Tensor) -> Tensor:
    diagonal, off = cross_correlation(gather(z1), gather(z2))
    return (1 - diagonal).square().sum() + 0.0051 * off + covariance_penalty(gather(z1))


def not_differentiated(z1: Tensor, z2: Tensor) -> Tensor:
    """The old trap: C is summed over ranks in place, so that each rank's gradient knows its own part alone."""
    parts = []
    for z in (z1, z2):
        whole = gather(z)
        standard = (whole - whole.mean(0)) / (whole.var(0, correction=0) + 1e-5).sqrt()
        parts.append(standard.chunk(len(whole) // len(z))[rank()])  # as synchronised batch norm gives it
    c = parts[0].T @ parts[1] / len(whole)  # [D, D], of this rank's images
    with torch.no_grad():
        total = sum(gather(c[None]))
    c = c + (total - c.detach())
    off = c.square().sum() - c.diagonal().square().sum()
    return (1 - c.diagonal()).square().sum() + 0.0051 * off


def layer_gradients(
    own: int, world_size: int, loss: Callable[[Tensor, Tensor], Tensor], columns: int
) -> tuple[float, Tensor]:
    layer = nn.Linear(3, columns, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(normal(columns, 3, seed=7))
    share = slice(own * 8 // world_size, (own + 1) * 8 // world_size)
    z1, z2 = (layer(normal(8, 3, seed=seed)[share].square()) for seed in (0, 1))
    value = loss(z1, z2)
    value.backward()
    return value.item(), averaged_gradients(layer, world_size)["weight"]


@pytest.mark.parametrize("columns", [5, 20])
def test_gradient_on_two_ranks_is_that_of_one_process(columns: int) -> None:
    value, whole = layer_gradients(0, 1, gathered, columns)
    for found, gradient in run_on_ranks(layer_gradients, 2, 2, gathered, columns):
        assert found == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-12)


def test_a_sum_over_ranks_that_is_not_differentiated_fails_that_test() -> None:
    """The loss is right, and the gradient is the true one divided by the number of ranks."""
    value, whole = layer_gradients(0, 1, not_differentiated, 5)
    for found, gradient in run_on_ranks(layer_gradients, 2, 2, not_differentiated, 5):
        assert found == pytest.approx(value, rel=1e-12)
        assert not torch.allclose(gradient, whole, rtol=1e-2)
        torch.testing.assert_close(gradient, whole / 2, rtol=1e-9, atol=1e-12)
