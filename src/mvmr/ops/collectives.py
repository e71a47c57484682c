"""Communication between ranks, with gradients; every function is the identity, or does nothing, on one process.

The gradient convention is that of the sum over ranks of their losses. With `gather`, every rank computes the same loss
L of the same global batch; the parameter gradients then add up over ranks to W dL, and the mean over ranks that
DistributedDataParallel takes is exactly the gradient of one process on the whole batch.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Value = TypeVar("Value")


def world_size() -> int:
    """The number of ranks, W; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in 0..W-1; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, with gradient (architecture, decision 5): [B, ...] -> [W * B, ...].

    Any dtype and device of the process group; the ranks' shapes must be equal. The backward pass adds up the
    gradients of all ranks and returns this rank's rows; a tensor without gradient costs no backward pass.
    Raises ValueError for unequal shapes on CPU; elsewhere the check would wait for the device, and is left out.
    """
    if world_size() == 1:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(x)
    return _all_gather(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over ranks, with gradient; x of any shape, equal on all ranks, is left unchanged."""
    if world_size() == 1:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _AllReduceSum.apply(x)
    return _summed_over_ranks(x)


def from_first_rank(x: Tensor) -> Tensor:
    """Rank 0's x on every rank, without gradient: what is drawn at random and must be equal everywhere.

    Any dtype and device of the process group; x has the same shape and dtype on all ranks, and is left unchanged.
    """
    if world_size() == 1:
        return x.detach()
    if x.dtype == torch.bool:  # gloo has no booleans
        return from_first_rank(x.contiguous().view(torch.uint8)).view(torch.bool)
    values = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(values, src=0)
    return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _summed_over_ranks(gradient).chunk(world_size())[rank()]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _summed_over_ranks(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _summed_over_ranks(gradient)


def _all_gather(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        _check_equal_shapes(x)
    rows = x.detach().contiguous()
    if x.dtype == torch.bool:  # gloo has no booleans
        return _all_gather(rows.view(torch.uint8)).view(torch.bool)
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows)
    return gathered


def _check_equal_shapes(x: Tensor) -> None:
    """Unequal messages would hang or mix rows, so the (rows, values) pairs of the ranks are compared first."""
    mine = torch.tensor([x.shape[0], x.numel()])
    pairs = mine.new_empty(2 * world_size())
    dist.all_gather_into_tensor(pairs, mine)
    if not torch.equal(pairs, mine.repeat(world_size())):
        raise ValueError(
            f"gather needs the same shape on every rank, but rank {rank()} has {tuple(x.shape)} and the ranks' row "
            f"counts are {pairs[::2].tolist()}: drop the last, smaller batch (drop_last)"
        )


def _summed_over_ranks(x: Tensor) -> Tensor:
    """A fresh tensor; 16-bit values are added up in float32, so that the sum does not lose bits with each rank."""
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    total: Any = x.detach().float() if narrow else x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total.to(x.dtype)
