"""A classifier for each super-class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional


class SubHeads(nn.Module):
    """A linear classifier for each super-class: [B, D] and [B] -> [B, K], each row by its own super-class's.

    Zero at the start: who owns it draws it.
    """

    def __init__(self, dim: int, classes: int, clusters: int):
        super().__init__()
        self.weight = Parameter(torch.zeros(classes, clusters, dim))
        self.bias = Parameter(torch.zeros(classes, clusters))

    def forward(self, x: Tensor, super_class: Tensor) -> Tensor:
        order = super_class.argsort(stable=True)
        counts = super_class.bincount(minlength=len(self.weight)).tolist()
        parts = zip(x[order].split(counts), self.weight.unbind(0), self.bias.unbind(0), strict=True)
        scores = torch.cat([functional.linear(rows, weight, bias) for rows, weight, bias in parts if len(rows)])
        return torch.zeros_like(scores).index_copy(0, order, scores)
