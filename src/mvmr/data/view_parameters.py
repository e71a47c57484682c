"""The random parameters of views, each a pure function of one image's draws; all on the CPU, in float64.

Every image has a row of uniform numbers a view (`view_draws`), and every parameter has columns of its own in it: to
switch an operation off or on changes no other parameter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvmr.data.view_recipes import Blur, Crop, Jitter, PadCrop
from mvmr.ops.random import uniform

__all__ = [
    "blur_sigmas",
    "chosen",
    "crop_boxes",
    "jitter_factors",
    "jitter_orders",
    "pad_offsets",
    "quarter_turns",
    "view_draws",
]

_COLUMNS = {
    "flip": 0,
    "rotate90": 1,
    "jitter": 2,
    "order": 3,
    "gray": 8,
    "blur": 9,
    "sigma": 10,
    "solarise": 11,
    "top": 12,
    "left": 13,
}
_FACTORS, _AREAS, _RATIOS = slice(4, 8), slice(14, 34, 2), slice(15, 34, 2)
_DRAWS = 34
_ORDERS = 24  # of four colour changes


def view_draws(seed: int, epoch: int, index: Tensor, views: int) -> Tensor:
    """Uniform numbers for every view of every image; view number v is the generator's stream v.

    index: int64 [B], on the CPU. Returns float64 [views, B, 34] in (0, 1).
    """
    streams = torch.arange(views).unsqueeze(1)  # [V, 1]
    return uniform(seed, epoch, index, streams, _DRAWS)


def chosen(draws: Tensor, operation: str, probability: float) -> Tensor:
    """Positions of the images that an operation of this probability happens to: int64 [A], ascending.

    draws: [B, 34]. operation: flip, jitter, gray, blur or solarise.
    """
    return (draws[:, _COLUMNS[operation]] < probability).nonzero().flatten()


def crop_boxes(crop: Crop, draws: Tensor, height: int, width: int) -> Tensor:
    """Random parts as torchvision's RandomResizedCrop draws them.

    The first of ten pairs of area and ratio that fits the image, at a uniform place; else the largest central part.
    draws: [B, 34]; height, width: the images' size. Returns int64 [B, 4]: top, left, height, width.
    """
    low, high = crop.scale
    areas = (draws[:, _AREAS] * (high - low) + low) * (height * width)  # [B, 10]
    low, high = (math.log(r) for r in crop.ratio)
    ratios = torch.exp(draws[:, _RATIOS] * (high - low) + low)
    widths, heights = torch.round(torch.sqrt(areas * ratios)), torch.round(torch.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # [B, 1]; argmax gives the first of equals
    h, w = heights.gather(1, first).squeeze(1), widths.gather(1, first).squeeze(1)
    top = torch.floor(draws[:, _COLUMNS["top"]] * (height - h + 1))
    left = torch.floor(draws[:, _COLUMNS["left"]] * (width - w + 1))
    boxes = torch.stack((top, left, h, w), dim=1).to(torch.int64)
    boxes[~fits.any(1)] = torch.tensor(_central_box(crop.ratio, height, width))
    return boxes


def _central_box(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """The largest central part whose width / height lies in `ratio`."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def pad_offsets(pad_crop: PadCrop, draws: Tensor) -> Tensor:
    """Where the window begins in the padded image: int64 [B, 2], top and left, uniform on 0 ... 2 padding."""
    places = 2 * pad_crop.padding + 1
    return torch.floor(torch.stack([draws[:, _COLUMNS[side]] for side in ("top", "left")], 1) * places).to(torch.int64)


def quarter_turns(draws: Tensor) -> Tensor:
    """Turns by 90 degrees: int64 [B], uniform on 0 ... 3."""
    return torch.floor(draws[:, _COLUMNS["rotate90"]] * 4).to(torch.int64)


def jitter_factors(jitter: Jitter, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation factors and hue shifts: float64 [B, 4]."""
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    low = torch.tensor([*(max(0.0, 1 - s) for s in strengths), -jitter.hue], dtype=torch.float64)
    high = torch.tensor([*(1 + s for s in strengths), jitter.hue], dtype=torch.float64)
    return draws[:, _FACTORS] * (high - low) + low


def jitter_orders(draws: Tensor) -> Tensor:
    """Numbers of the permutation in which the four colour changes are made: int64 [B], uniform on 0 ... 23."""
    return torch.floor(draws[:, _COLUMNS["order"]] * _ORDERS).to(torch.int64)


def blur_sigmas(blur: Blur, draws: Tensor) -> Tensor:
    """Standard deviations in pixels: float64 [B]."""
    low, high = blur.sigma
    return draws[:, _COLUMNS["sigma"]] * (high - low) + low
