"""float32 whatever autocast, TF32 and bfloat16 switches say, for what half the digits would spoil."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The same values in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product a b in full float32 (or float64), its gradients' products too: [n, k], [k, m] -> [n, m]."""
    product: Tensor = torch.ops.mvmr.matmul(a, b)
    return product


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Matrix products of float32 in float32, not TF32 or bfloat16, whatever the process has allowed; then as before."""
    backends: Any = torch.backends  # its modules are made at run time, out of a type checker's sight
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    if (cuda if device_type == "cuda" else cpu).fp32_precision in ("ieee", "none"):
        yield
        return
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say after a change by fp32_precision alone
        legacy = "highest"
    torch.set_float32_matmul_precision("highest")  # sets both kinds of switch: CUDA checks that they agree
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        cuda.fp32_precision, cpu.fp32_precision = before


# An operator of its own, because the switch must also be off in the backward pass, and torch.compile can neither trace
# the switch nor know of it: it takes the operator as it is.
torch.library.define("mvmr::matmul", "(Tensor a, Tensor b) -> Tensor")


@torch.library.impl("mvmr::matmul", "CompositeExplicitAutograd")
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False), full_float32(a.device.type):
        return a @ b


@torch.library.register_fake("mvmr::matmul")
def _matmul_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    return (
        torch.ops.mvmr.matmul(gradient, b.T) if ctx.needs_input_grad[0] else None,
        torch.ops.mvmr.matmul(a.T, gradient) if ctx.needs_input_grad[1] else None,
    )


torch.library.register_autograd("mvmr::matmul", _matmul_gradients, setup_context=_keep_factors)
