"""BatchNorm over the batch of all ranks, and what every kind of batch norm of ours needs to take another's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mvmr.ops.collectives import all_reduce_sum, world_size
from mvmr.types import UserError


class Replacement(_NormBase):
    """A batch norm that may stand for timm's BatchNormAct2d, whose dropout and activation must not be lost then."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()


class GlobalBatchNorm(Replacement, _BatchNorm):
    """BatchNorm with the statistics of all ranks' batches, for any device and dtype: [B, C] or [B, C, ...], same out.

    Takes the arguments and has the state_dict of nn.BatchNorm1d and 2d, and equals them on one process and in eval
    mode. Statistics are taken in float32 or, for such an input, in float64. The ranks' batches may differ in size.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"GlobalBatchNorm takes [B, C] or [B, C, ...], not {input.dim()} dimension(s)")

    def forward(self, input: Tensor) -> Tensor:
        across_ranks = self.training and world_size() > 1
        return self.act(self.drop(self._over_all_ranks(input) if across_ranks else super().forward(input)))

    def _over_all_ranks(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = [0, *range(2, x.dim())]
        columns = (1, -1, *(1 for _ in axes[1:]))  # the shape [1, C, 1, ...]
        values = x.new_tensor([x.numel() / self.num_features])
        total = all_reduce_sum(torch.cat([x.sum(axes), values]))  # [C + 1]
        count = total[-1].detach()
        mean = total[:-1] / count  # [C]
        deviation = x - mean.view(columns)  # a second pass: E[x^2] - E[x]^2 would cancel
        variance = all_reduce_sum(deviation.square().sum(axes)) / count  # [C]
        track(self, mean.detach(), variance.detach() * (count / (count - 1)))
        output = deviation * (variance + self.eps).rsqrt().view(columns)
        if self.affine:
            output = output * self.weight.view(columns) + self.bias.view(columns)
        return output.to(input.dtype)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every BatchNorm in `module` (in place) by one with the statistics of all ranks; returns the module.

    torch's SyncBatchNorm where the module's parameters are on CUDA, else `GlobalBatchNorm`. Parameters and buffers
    stay the same objects with the same names. Raises UserError for a BatchNorm class that it does not know.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in norms if not isinstance(m, (GlobalBatchNorm, nn.SyncBatchNorm))]
    with_activation = _known(
        norms,
        refusal="cannot synchronise the BatchNorm class {} over ranks: train this encoder on one device, or choose one "
        "with nn.BatchNorm layers",
    )
    if any(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers())):
        if not with_activation:
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        from timm.layers import convert_sync_batchnorm  # keeps the activation, which torch's would drop

        return convert_sync_batchnorm(module)
    return _replaced(module, norms, GlobalBatchNorm)


def replace_batch_norm(module: nn.Module, build: Callable[..., Replacement], *, refusal: str) -> nn.Module:
    """Replaces every BatchNorm in `module` (in place) by what `build` makes of its settings; returns the module.

    Parameters and buffers stay the same objects with the same names; timm's BatchNormAct2d keeps its dropout and
    activation. refusal: the message, with {} for the class, of the UserError for a BatchNorm class that is not known.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    _known(norms, refusal=refusal)
    return _replaced(module, norms, build)


@torch.no_grad()
def track(norm: _NormBase, mean: Tensor, unbiased_variance: Tensor) -> None:
    """Move the running statistics of `norm`, if it has any, towards a batch's [C], as nn.BatchNorm does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    weight = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(unbiased_variance.to(norm.running_var.dtype), weight)


def _known(norms: Sequence[_BatchNorm], *, refusal: str) -> list[_BatchNorm]:
    """Those of `norms` that are timm's, with an activation; UserError for a class that is neither torch's nor that."""
    others = [norm for norm in norms if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    if others:
        from timm.layers import BatchNormAct2d

        unknown = sorted({type(norm).__name__ for norm in others if type(norm) is not BatchNormAct2d})
        if unknown:
            raise UserError(refusal.format(", ".join(unknown)))
    return others


def _replaced(module: nn.Module, norms: Sequence[_BatchNorm], build: Callable[..., Replacement]) -> nn.Module:
    replacements: dict[nn.Module, nn.Module] = {norm: _holding(norm, build) for norm in norms}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(module, module)


def _holding(norm: _BatchNorm, build: Callable[..., Replacement]) -> Replacement:
    """A norm of the settings of `norm` that holds the very parameters and buffers of it."""
    new = build(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    children = dict(norm.named_children())
    new.drop, new.act = children.get("drop", new.drop), children.get("act", new.act)
    return new.train(norm.training)
