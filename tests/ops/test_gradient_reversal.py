"""Gradient reversal: the identity forwards, alpha times the gradient backwards."""

from __future__ import annotations

import pytest
import torch

from mvmr.ops.gradient_reversal import reverse_gradient


@pytest.mark.parametrize("alpha", [-1.0, -0.1, 0.0, 1.0])
def test_forward_is_the_identity_and_backward_alpha_times_the_gradient(alpha: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, alpha)
    assert torch.equal(y, x)
    gradient = torch.randn_like(x)
    (found,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(found, alpha * gradient)


def test_gradcheck_against_a_function_with_that_gradient() -> None:
    """f(reverse(x)) has the gradient of -0.3 f: finite differences see f, so the two are told apart."""
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reverse_gradient(v, 1.0).sin(), x)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda v: reverse_gradient(v, -0.3).sin(), x)
    reverse_gradient(x, -0.3).sin().sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * x.detach().cos())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_and_graphs_without_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3).to(dtype)
    assert reverse_gradient(x, -1.0).dtype == dtype
    assert not reverse_gradient(x, -1.0).requires_grad
    wanted = x.clone().requires_grad_()
    reverse_gradient(wanted, -2.0).sum().backward()
    assert wanted.grad.dtype == dtype
    assert torch.equal(wanted.grad, torch.full_like(x, -2.0))
