"""Layers that several methods share: the heads behind an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

LastNorm = Literal["none", "plain", "scale"]
"""What follows an MLP's last layer: nothing, batch norm without parameters, or batch norm with a scale and no shift."""


def mlp(
    widths: Sequence[int],
    *,
    bias: bool = False,
    last_bias: bool | None = None,
    norm: bool = True,
    last_norm: LastNorm = "none",
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Blocks of Linear, BatchNorm and ReLU, and a last Linear: [B, widths[0]] -> [B, widths[-1]].

    `mlp([dim, 8192, 8192, 8192])` is the projector of MV-MR. bias: of the inner Linears; last_bias: of the last one, as
    the inner ones if not given. norm: False leaves the inner batch norms out. Raises ValueError for fewer than two
    widths.
    """
    if len(widths) < 2:
        raise ValueError(f"mlp needs an input and an output width, not {list(widths)}")
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers.append(nn.Linear(width_in, width_out, bias=bias))
        if norm:
            layers.append(nn.BatchNorm1d(width_out))
        layers.append(activation(inplace=True) if activation is nn.ReLU else activation())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias if last_bias is None else last_bias))
    if last_norm != "none":
        layers.append(nn.BatchNorm1d(widths[-1], affine=last_norm == "scale"))
    if last_norm == "scale":
        layers[-1].bias.requires_grad_(False)  # stays at 0
    return nn.Sequential(*layers)


@torch.no_grad()
def redraw(parameters: Iterable[Tensor], *, seed: int, std: float = 0.01) -> None:
    """Draw weights anew, in place: tensors of two dimensions or more from N(0, std^2), biases 0.

    A function of the seed alone, so equal on all ranks and devices; drawn in float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))
