"""Batch norm in groups and the shuffle that goes with it: MoCo's batch norm of eight GPUs, on any number of them.

He, Fan, Wu, Xie, Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR 2020, Section 3.3
("Shuffling BN"). There a group is a GPU; here the global batch is cut into equal, contiguous groups. Rank r of W has
rows r B/W to (r + 1) B/W of it, and so whole groups where W divides their number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mvmr.ops.batch_norm import Replacement, replace_batch_norm, track
from mvmr.ops.collectives import all_reduce_sum, from_first_rank, gather, rank, world_size


class SplitBatchNorm(Replacement):
    """BatchNorm of each group of the global batch by its own statistics: [B, C] or [B, C, ...], same out.

    groups: of the global batch, so groups / W on each of W ranks. Takes the further arguments and has the state_dict of
    nn.BatchNorm1d and 2d; running statistics move by the mean over all groups of all ranks, and eval mode is that of
    nn.BatchNorm. No subclass of it, so that synchronising batch norm over ranks leaves it alone.
    Raises ValueError in train mode where W does not divide the groups, or they do not divide the batch.
    """

    def __init__(
        self,
        num_features: int,
        groups: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if groups < 1:
            raise ValueError(f"groups is {groups}; it must be 1 or more")
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            output = self._in_groups(input)
        else:  # without running statistics nn.BatchNorm takes the batch's
            alone = self.running_mean is None
            mean, variance = self.running_mean, self.running_var
            output = functional.batch_norm(input, mean, variance, self.weight, self.bias, alone, 0.0, self.eps)
        return self.act(self.drop(output))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"

    def _in_groups(self, input: Tensor) -> Tensor:
        groups, ranks = self.groups // world_size(), world_size()
        if self.groups % ranks or len(input) % groups:
            raise ValueError(
                f"{self.groups} groups cannot be shared by {ranks} rank(s) of {len(input)} images: the ranks must "
                "divide the groups, and the groups the batch"
            )
        tracked = self.running_mean
        dtype = torch.promote_types(input.dtype, torch.float32) if tracked is None else tracked.dtype
        statistics = [input.new_zeros(2, self.num_features, dtype=dtype) for _ in range(groups)]
        outputs = []
        for part, (mean, variance) in zip(input.chunk(groups), statistics, strict=True):
            # A momentum of 1 leaves the group's own mean and unbiased variance in the two rows.
            outputs.append(functional.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
        if tracked is not None:
            track(self, *all_reduce_sum(torch.stack(statistics).sum(0)) / self.groups)  # of all groups of all ranks
        return torch.cat(outputs) if groups > 1 else outputs[0]


def split_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """Replaces every BatchNorm in `module` (in place) by a SplitBatchNorm of so many groups; returns the module.

    Parameters and buffers stay the same objects with the same names; timm's BatchNormAct2d keeps its dropout and
    activation. Raises UserError for a BatchNorm class that it does not know.
    """
    return replace_batch_norm(
        module,
        lambda features, *settings: SplitBatchNorm(features, groups, *settings),
        refusal="cannot cut the BatchNorm class {} into groups: set method.batch_norm_groups=1, or choose an encoder "
        "with nn.BatchNorm layers",
    )


@torch.no_grad()
def shuffled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffle the global batch: this rank's rows [b, ...] -> as many rows of any rank, and the order [B] int64.

    Section 3.3 of MoCo. The order is drawn on the CPU by torch's default generator, and rank 0's is taken: seeded
    alike there, 1 and W ranks have the same one. Without gradient.
    """
    order = from_first_rank(torch.randperm(len(x) * world_size()).to(x.device))  # [B]
    return gather(x)[_own(order)], order


@torch.no_grad()
def unshuffled(x: Tensor, order: Tensor) -> Tensor:
    """What `shuffled` did, undone: [b, ...] in that order, and the order [B] -> this rank's own rows [b, ...]."""
    return gather(x)[_own(order.argsort())]


def _own(order: Tensor) -> Tensor:
    return order.chunk(world_size())[rank()]
