"""Common corruptions of images at five severities, named after Hendrycks and Dietterich (ICLR 2019), made here.

The strengths are those of the authors' scripts for CIFAR-10-C, Tiny-ImageNet-C and ImageNet-C. The images are not
theirs: random numbers differ, and values are rounded where theirs are cut. Images are uint8 [B, 3, H, W] in and out;
nothing depends on the batch, and CPU and GPU differ at most where rounding is at a tie. Between, arithmetic is float64.
"""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvmr.errors import nearest
from mvmr.ops.random import uniform

LEVELS: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar": {  # make_cifar_c.py, 32 pixels
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "jpeg": (80, 65, 58, 50, 40),
    },
    "tiny_imagenet": {  # make_tinyimagenet_c.py, 64 pixels
        "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "gaussian_blur": (0.5, 0.75, 1.0, 1.25, 1.5),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "jpeg": (65, 58, 50, 40, 25),
    },
    "imagenet": {  # make_imagenet_c.py, 224 pixels
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "gaussian_blur": (1.0, 2.0, 3.0, 4.0, 6.0),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "jpeg": (25, 18, 15, 10, 7),
    },
}
"""Severities 1 to 5: deviation of noise and shift of brightness for values in [0, 1], deviation of the blur in pixels,
JPEG quality."""
CORRUPTIONS = tuple(LEVELS["cifar"])
SEVERITIES = (1, 2, 3, 4, 5)

_NOISE_STREAM = 0xFFFFFFFC
"""The stream of the noise; the streams of views are small numbers, the three above are taken."""
_TRUNCATE = 4.0
"""Deviations at which the blur's window ends, as in scipy and scikit-image."""
_DRAWS = 1 << 22
"""Random numbers held at a time."""


def levels_for(side: int) -> str:
    """The table of LEVELS for images of `side` pixels: the nearest of 32, 64 and 224 by ratio (a choice made here)."""
    return "cifar" if side <= 45 else "tiny_imagenet" if side <= 119 else "imagenet"


def corrupt(
    images: Tensor, index: Tensor, corruption: str, severity: int, *, seed: int = 0, levels: str = "auto"
) -> Tensor:
    """The images under a corruption: a pure function of (seed, index, corruption, severity) and the image.

    index: [B] int64, positions in the data set. corruption: of CORRUPTIONS. severity: 1 to 5; 0 leaves images as they
    are. levels: a table of LEVELS; auto takes the one for the shorter side. Raises ValueError for anything else.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are uint8 [B, 3, H, W]; these are {images.dtype} {list(images.shape)}")
    table = LEVELS.get(levels_for(min(images.shape[-2:])) if levels == "auto" else levels)
    if table is None:
        raise ValueError(f"no levels {levels!r}{nearest(levels, LEVELS)}; known: auto, {', '.join(LEVELS)}")
    if corruption not in table:
        raise ValueError(f"no corruption {corruption!r}{nearest(corruption, table)}; known: {', '.join(table)}")
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity is {severity}; it must be 1 to 5, or 0 for the image as it is")
    if severity == 0 or len(images) == 0:
        return images
    level = table[corruption][severity - 1]
    if corruption == "gaussian_noise":
        return gaussian_noise(images, index, level, seed=seed, draw=severity)
    if corruption == "gaussian_blur":
        return gaussian_blur(images, level)
    return brightness(images, level) if corruption == "brightness" else jpeg(images, round(level))


def gaussian_noise(images: Tensor, index: Tensor, deviation: float, *, seed: int = 0, draw: int = 0) -> Tensor:
    """Each value in [0, 1] plus normal noise of this deviation, clipped to [0, 1]; another noise for each `draw`."""
    size = math.prod(images.shape[1:])
    index = index.to(images.device)
    parts = [
        _as_bytes(_as_double(some) + deviation * normal(seed, draw, which, size).view_as(some))
        for some, which in zip(*(t.split(max(1, _DRAWS // size)) for t in (images, index)), strict=True)
    ]
    return torch.cat(parts)


def normal(seed: int, draw: int, index: Tensor, count: int) -> Tensor:
    """Normal numbers [B, count] float64 for each index [B], a pure function of the arguments (Box and Muller, 1958)."""
    drawn = uniform(seed, draw, index, _NOISE_STREAM, 2 * math.ceil(count / 2)).unflatten(1, (-1, 2))
    radius, angle = (-2 * drawn[..., 0].log()).sqrt(), 2 * math.pi * drawn[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of deviation `sigma` in pixels with a window of four deviations, edge pixels repeated beyond."""
    if sigma == 0:
        return images
    rows, columns = (_blur_matrix(side, sigma).to(images.device) for side in images.shape[-2:])
    return _as_bytes(rows @ _as_double(images) @ columns.T)


def _blur_matrix(side: int, sigma: float) -> Tensor:
    """[side, side]: how much of each pixel a blurred one holds."""
    radius = int(_TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    taps = torch.softmax(-0.5 * (offsets.double() / sigma).square(), dim=0)
    read = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)  # [side, taps]
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, read, taps.expand(side, -1))


def brightness(images: Tensor, shift: float) -> Tensor:
    """The greatest of a pixel's values (V of HSV) raised by `shift`, to 1 at most; hue and saturation stay."""
    x = _as_double(images)
    value = x.amax(1, keepdim=True)  # [B, 1, H, W]
    raised = (value + shift).clamp_max(1)
    black = value == 0  # has no hue, and becomes grey
    return _as_bytes(torch.where(black, raised, x * raised / torch.where(black, 1.0, value)))


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Each image written as JPEG by Pillow and read again; quality 1 to 95, and colours at half resolution."""
    read = []
    for pixels in images.permute(0, 2, 3, 1).cpu().contiguous().numpy():  # [H, W, 3]
        file = BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        with Image.open(file) as image:
            read.append(np.asarray(image))
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _as_double(images: Tensor) -> Tensor:
    return images.double() / 255


def _as_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)
