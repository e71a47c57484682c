"""What holds for a while, and afterwards is as before: eval mode, and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators, the CPU's and that of `device`, seeded inside; outside they go on as if nothing was drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
