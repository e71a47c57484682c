"""Embeddings as directions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mvmr.ops.precision import at_least_float32


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1, in float32 at least: [B, D] -> [B, D]. A row of zeros stays one."""
    return functional.normalize(at_least_float32(x), dim=1)
