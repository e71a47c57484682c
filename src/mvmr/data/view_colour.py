"""Colour changes of views: batched, with one parameter set an image, on float32 [B, 3, H, W] in [0, 1] and any device.

They follow torchvision's float semantics: results are clamped to [0, 1] after every change. Parameters come on the CPU,
so that images can be sorted into groups without asking a GPU for anything.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

__all__ = ["grayscale", "jitter", "luma"]

ORDERS = tuple(permutations(range(4)))
"""The 24 orders of the four changes: 0 brightness, 1 contrast, 2 saturation, 3 hue."""

_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_LUMA = (0.2989, 0.587, 0.114)  # Rec. 601, with torchvision's digits


def luma(images: Tensor) -> Tensor:
    """Grey values (Rec. 601): [B, 3, H, W] -> [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def grayscale(images: Tensor) -> Tensor:
    """Grey images with three equal channels."""
    return luma(images).expand(-1, 3, -1, -1)


def jitter(images: Tensor, factors: Tensor, orders: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue changed, in every image by its own factors and in its own order.

    factors: [B, 4] on the CPU: three factors >= 0, and a hue shift in turns, in [-0.5, 0.5]. orders: int64 [B] on the
    CPU, positions in ORDERS. Returns a new tensor [B, 3, H, W].
    """
    sequence = torch.tensor(ORDERS)[orders]  # [B, 4]: which change is made at each time
    hue_time = (sequence == _HUE).to(torch.uint8).argmax(1)
    grouped = torch.argsort(hue_time, stable=True)  # the images whose hue changes at one time stand together
    bounds = [0, *torch.bincount(hue_time, minlength=4).cumsum(0).tolist()]
    blends = _blend_weights(sequence[grouped], factors[grouped]).to(images.device, non_blocking=True)  # [4, 3, B]
    shifts = factors[grouped, _HUE].to(torch.float32).to(images.device, non_blocking=True)
    hue_is_off = not bool(factors[:, _HUE].any())

    where = grouped.to(images.device, non_blocking=True)
    x = images.index_select(0, where)
    for time in range(4):
        first, last = bounds[time], bounds[time + 1]
        _blend(x[:first], blends[time, :, :first])
        _blend(x[last:], blends[time, :, last:])
        if not hue_is_off:
            _shift_hue(x[first:last], shifts[first:last])
    return x.index_select(0, torch.argsort(grouped).to(images.device, non_blocking=True))


def _blend_weights(sequence: Tensor, factors: Tensor) -> Tensor:
    """What the change at each time multiplies: [4 times, (image, its grey, the grey's mean), B] float32."""
    factor = factors.gather(1, sequence)  # [B, 4]
    rest = 1 - factor
    weights = torch.stack((factor, rest * (sequence == _SATURATION), rest * (sequence == _CONTRAST)))  # [3, B, 4]
    return weights.permute(2, 0, 1).to(torch.float32)


def _blend(images: Tensor, weights: Tensor) -> None:
    """Brightness, contrast or saturation, in place: a mixture of the image with black, its mean grey or its grey.

    weights: [3, B], of the image, its grey and the grey's mean. One formula for all three needs no groups.
    """
    if len(images) == 0:
        return
    own, gray_part, mean_part = weights.view(3, -1, 1, 1, 1)
    gray = luma(images)  # [B, 1, H, W]
    mean = gray.mean((1, 2, 3), keepdim=True)
    images.mul_(own).add_(gray.mul_(gray_part).add_(mean.mul_(mean_part))).clamp_(0, 1)


def _shift_hue(images: Tensor, shifts: Tensor) -> None:
    """Hue turned by shifts [B], in place; the greatest and least channel of a pixel (value and chroma) stay.

    HSV to RGB in closed form: channel = value - chroma * clamp(2 - 6 |d|, 0, 1), with d the distance in turns, on the
    colour circle, from the channel's opposite hue (1/2 for red, 5/6 for green, 1/6 for blue).
    """
    if len(images) == 0:
        return
    red, green, blue = images.split(1, dim=1)  # [B, 1, H, W]
    # Two exchanges sort the channels; each mirrors or moves the part of the circle that hue is measured in. Comparisons
    # are written as numbers, since selecting by a mask costs several times as much.
    value = torch.maximum(green, blue)
    swap = torch.lt(green, blue, out=torch.empty_like(value))
    least = torch.minimum(green, blue)
    lead = torch.lt(red, value, out=torch.empty_like(value))
    middle = torch.minimum(red, value)
    value = torch.maximum(red, value)
    chroma = value - torch.minimum(least, middle)
    start = lead * swap
    start.mul_(2).sub_(swap).sub_(lead, alpha=1 / 3)  # 0, -1, -1/3 or 2/3 of a turn
    hue = middle.sub_(least).div_(chroma.clamp_min(1e-12)).mul_(1 / 6).add_(start).abs_().add_(shifts.view(-1, 1, 1, 1))
    opposite = torch.tensor([1 / 2, 5 / 6, 1 / 6]).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    distance = hue - opposite  # [B, 3, H, W]
    distance.sub_(distance.round()).abs_()
    torch.sub(value, distance.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma), out=images)
