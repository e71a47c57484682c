"""What holds for a while, and afterwards is as before: eval mode, and matrix products in full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, the training flag of every submodule is as it was (a frozen part stays frozen)."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


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
