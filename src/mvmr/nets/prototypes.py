"""Layers of prototypes: cosine similarities to learnt directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Prototypes(nn.Module):
    """Scores of K directions of unit norm: [B, D] -> [B, K], g_k <x, w_k / ||w_k||> (weight norm, Salimans and Kingma,
    NeurIPS 2016), without bias.

    trainable_gain: False fixes every g_k at 1, and then there is no such parameter. Computed in float32 (or float64)
    outside autocast: in bfloat16 a cosine has three digits, which a temperature of 0.04 turns into errors of 5 %.
    """

    def __init__(self, dim: int, count: int, *, trainable_gain: bool = False):
        super().__init__()
        # nn.Linear's start, whose rows have nearly equal norms; norms matter only for how fast directions move.
        self.weight = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.gain = nn.Parameter(torch.ones(count)) if trainable_gain else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            directions = functional.normalize(self.weight, dim=1)  # [K, D]
            scores = functional.linear(x.to(directions.dtype), directions)  # [B, K]
            return scores if self.gain is None else scores * self.gain
