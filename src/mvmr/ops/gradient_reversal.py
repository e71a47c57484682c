"""The gradient reversal layer: Ganin et al., "Domain-adversarial training of neural networks", JMLR 2016, Section 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reverse_gradient(x: Tensor, alpha: float) -> Tensor:
    """The identity, whose backward pass multiplies the gradient by alpha: any shape and dtype, same out.

    alpha < 0 lets what comes before learn against what comes after, as in OSS (Section 3.3); 0 cuts them apart, and 1
    is the plain identity.
    """
    return _Reversal.apply(x, alpha)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.alpha * gradient, None
