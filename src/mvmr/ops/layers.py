"""Layers that several parts share: heads, and BatchNorm over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvmr.ops.collectives import all_reduce_sum, world_size
from mvmr.types import UserError

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


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of all ranks' batches, for any device and dtype: [B, C] or [B, C, ...], same out.

    Takes the arguments and has the state_dict of nn.BatchNorm1d and 2d, and equals them on one process and in eval
    mode. Statistics are taken in float32 or, for such an input, in float64. The ranks' batches may differ in size.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        # timm's BatchNormAct2d holds a dropout and an activation, which must not be lost when it is replaced.
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

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
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        output = deviation * (variance + self.eps).rsqrt().view(columns)
        if self.affine:
            output = output * self.weight.view(columns) + self.bias.view(columns)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), weight)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every BatchNorm in `module` (in place) by one with the statistics of all ranks; returns the module.

    torch's SyncBatchNorm where the module's parameters are on CUDA, else `GlobalBatchNorm`. Parameters and buffers
    stay the same objects with the same names. Raises UserError for a BatchNorm class that it does not know.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in norms if not isinstance(m, (GlobalBatchNorm, nn.SyncBatchNorm))]
    with_activation = [m for m in norms if type(m) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    _check_known(with_activation)
    if any(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers())):
        if not with_activation:
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        from timm.layers import convert_sync_batchnorm  # keeps the activation, which torch's would drop

        return convert_sync_batchnorm(module)
    replacements = {norm: _global_norm(norm) for norm in norms}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm) and child in replacements:
                setattr(parent, name, replacements[child])
    return replacements[module] if isinstance(module, _BatchNorm) and module in replacements else module


def _check_known(norms: Sequence[nn.Module]) -> None:
    if not norms:
        return
    from timm.layers import BatchNormAct2d

    unknown = sorted({type(norm).__name__ for norm in norms if type(norm) is not BatchNormAct2d})
    if unknown:
        raise UserError(
            f"cannot synchronise the BatchNorm class {', '.join(unknown)} over ranks: "
            "train this encoder on one device, or choose one with nn.BatchNorm layers"
        )


def _global_norm(norm: _BatchNorm) -> GlobalBatchNorm:
    """A GlobalBatchNorm that holds the very parameters and buffers of `norm`."""
    new = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    children = dict(norm.named_children())
    new.drop, new.act = children.get("drop", new.drop), children.get("act", new.act)
    return new.train(norm.training)
