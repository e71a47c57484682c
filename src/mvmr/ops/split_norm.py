"""Batch norm in groups and the shuffle that goes with it: MoCo's batch norm of eight GPUs, on any number of them.

He, Fan, Wu, Xie, Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR 2020, Section 3.3
("Shuffling BN"). There a group is a GPU; here the global batch is cut into equal, contiguous groups. Rank r of W has
rows r B/W to (r + 1) B/W of it, and so whole groups where W divides their number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mvmr.ops.collectives import all_reduce_sum, from_first_rank, gather, rank, world_size
from mvmr.types import UserError


class SplitBatchNorm(_NormBase):
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
        # timm's BatchNormAct2d holds a dropout and an activation, which must not be lost when it is replaced.
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

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
        self._track(torch.stack(statistics))
        return torch.cat(outputs) if groups > 1 else outputs[0]

    @torch.no_grad()
    def _track(self, statistics: Tensor) -> None:
        """Running statistics towards the mean over all groups of all ranks; statistics: [groups here, 2, C]."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        mean, variance = (all_reduce_sum(statistics.sum(0)) / self.groups).to(self.running_mean.dtype)
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)


def split_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """Replaces every BatchNorm in `module` (in place) by a SplitBatchNorm of so many groups; returns the module.

    Parameters and buffers stay the same objects with the same names; timm's BatchNormAct2d keeps its dropout and
    activation. Raises UserError for a BatchNorm class that it does not know.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    _check_known(norms)
    replacements: dict[nn.Module, nn.Module] = {norm: _split_norm(norm, groups) for norm in norms}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(module, module)


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


def _check_known(norms: list[_BatchNorm]) -> None:
    others = [norm for norm in norms if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    if not others:
        return
    from timm.layers import BatchNormAct2d

    unknown = sorted({type(norm).__name__ for norm in others if type(norm) is not BatchNormAct2d})
    if unknown:
        raise UserError(
            f"cannot cut the BatchNorm class {', '.join(unknown)} into groups: set method.batch_norm_groups=1, "
            "or choose an encoder with nn.BatchNorm layers"
        )


def _split_norm(norm: _BatchNorm, groups: int) -> SplitBatchNorm:
    """A SplitBatchNorm that holds the very parameters and buffers of `norm`."""
    new = SplitBatchNorm(norm.num_features, groups, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    children = dict(norm.named_children())
    new.drop, new.act = children.get("drop", new.drop), children.get("act", new.act)
    return new.train(norm.training)
