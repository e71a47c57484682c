"""Moving averages of networks: target, key and teacher networks that follow a trained one."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def follower(net: Net) -> Net:
    """A copy of `net`, buffers included, whose parameters need no gradient: how a moving average starts.

    Its residual branches are always kept: stochastic depth (timm's DropPath) is the trained network's alone.
    """
    average = copy.deepcopy(net).requires_grad_(False)
    for module in average.modules():
        if type(module).__name__ == "DropPath":  # by name: timm, whose class this is, is slow to import
            module.drop_prob = 0.0  # type: ignore[assignment]
    return average


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, momentum: float) -> None:
    """Average <- momentum average + (1 - momentum) net, parameter by parameter, in place.

    Buffers are left alone: an average in train mode has the batch statistics of its own forward passes, as in MoCo,
    BYOL and DINO. momentum in [0, 1]: 1 changes nothing, 0 copies. Raises ValueError for a momentum outside that, or
    for networks whose parameters differ in number or shape.
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1]")
    theirs, mine = [p.detach() for p in net.parameters()], [p.detach() for p in average.parameters()]
    if [p.shape for p in theirs] != [p.shape for p in mine]:
        raise ValueError("the average and the network that it follows have different parameters")
    # One call for all tensors; those of equal dtype and device go to one kernel on a GPU.
    torch._foreach_lerp_(mine, theirs, 1.0 - momentum)
