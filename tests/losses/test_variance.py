"""The invariance and variance terms against slow loops, limits and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mvmr.losses
from mvmr.losses import invariance, variance_hinge


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_public_names() -> None:
    assert mvmr.losses.__all__ == ["distance_correlation", "distance_covariance", "invariance", "variance_hinge"]


def test_invariance_equals_slow_loop() -> None:
    z1, z2 = normal(5, 7), normal(5, 7, seed=1)
    expected = sum(float((z1[i, d] - z2[i, d]) ** 2) for i in range(5) for d in range(7)) / 5  # Eq. 6
    assert invariance(z1, z2, reduction="sum").item() == pytest.approx(expected, abs=1e-12)
    assert invariance(z1, z2).item() == pytest.approx(expected / 7, abs=1e-12)
    assert invariance(z1, z1).item() == 0.0


@pytest.mark.parametrize(("gamma", "epsilon"), [(1.0, 1e-4), (0.5, 0.0), (2.0, 0.1)])
def test_variance_hinge_equals_slow_loop(gamma: float, epsilon: float) -> None:
    z = normal(9, 6) * torch.linspace(0.2, 2, 6)
    total = 0.0
    for d in range(6):  # Eqs. 7 and 8
        mean = sum(float(z[i, d]) for i in range(9)) / 9
        variance = sum((float(z[i, d]) - mean) ** 2 for i in range(9)) / 8
        total += max(0.0, gamma - (variance + epsilon) ** 0.5) / 6
    assert 0 < total < gamma
    assert variance_hinge(z, gamma=gamma, epsilon=epsilon).item() == pytest.approx(total, abs=1e-12)


def test_variance_hinge_limits() -> None:
    constant = torch.full((8, 4), 3.0, dtype=torch.float64)
    assert variance_hinge(constant).item() == pytest.approx(1 - 1e-4**0.5, abs=1e-12)
    assert variance_hinge(constant, epsilon=0.0).item() == 1.0
    assert variance_hinge(normal(64, 4) * 10).item() == 0.0


@pytest.mark.parametrize("epsilon", [1e-4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_columns_have_finite_gradients(epsilon: float, dtype: torch.dtype) -> None:
    z = normal(8, 3, dtype=dtype) * 0.1
    z[:, 1] = 0.3  # a mean that rounds
    z[:, 2] = 0.0
    z.requires_grad_()
    variance_hinge(z, epsilon=epsilon).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert torch.equal(z.grad[:, 2], torch.zeros(8, dtype=dtype))
    assert z.grad[:, 0].abs().min() > 0


def test_gradcheck() -> None:
    z1, z2 = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(lambda a, b: invariance(a, b, reduction=reduction), (z1, z2))  # noqa: B023
    for epsilon in (1e-4, 0.0):
        assert torch.autograd.gradcheck(lambda z: variance_hinge(z, gamma=3.0, epsilon=epsilon), z1)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z1, z2 = (normal(64, 32, seed=seed).to(dtype) * 300 for seed in (0, 1))  # squares near 90,000 overflow float16
    with torch.autocast("cpu", dtype=dtype):
        values = invariance(z1, z2, reduction="sum"), variance_hinge(z1, gamma=400.0)
    expected = (
        invariance(z1.double(), z2.double(), reduction="sum"),
        variance_hinge(z1.double(), gamma=400.0),
    )
    for value, reference in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference.item(), rel=1e-5)


def test_refuses() -> None:
    z = normal(4, 3)
    with pytest.raises(ValueError, match=r"two \[B, D\] embeddings"):
        invariance(z, z[:1])  # would broadcast
    with pytest.raises(ValueError, match="reduction must be"):
        invariance(z, z, reduction="none")
    with pytest.raises(ValueError, match="B >= 2"):
        variance_hinge(z[:1])
