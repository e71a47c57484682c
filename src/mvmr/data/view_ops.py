"""Geometry and blur of views: batched, with one parameter set an image, on [B, C, H, W] and any device.

Images are float32 in [0, 1] unless said otherwise; parameters come on the CPU (see view_parameters). A resampling is
two batched matrix products with a weight matrix per image and axis: crop, antialiased resize and mirror cost one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "as_bytes",
    "as_float",
    "change",
    "crop_resize",
    "flip",
    "gaussian_blur",
    "normalise",
    "pad_and_crop",
    "plain",
    "resize",
    "rotate90",
    "solarise",
]

_PLAIN_SHARE = 256 / 224  # the usual evaluation crop: shorter side to 256, then the central 224


def as_float(images: Tensor) -> Tensor:
    """uint8 becomes float32 in [0, 1]; floats are taken to lie there already."""
    return images.to(torch.float32).mul_(1 / 255) if images.dtype == torch.uint8 else images.to(torch.float32)


def as_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] become uint8, rounded to the nearest."""
    return images if images.dtype == torch.uint8 else images.mul(255).round_().to(torch.uint8)


def change(images: Tensor, positions: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Put function(images[positions]) in their place, in `images` itself where not all are meant; others cost nothing.

    positions: int64 [A], on the CPU, without repeats. function: [A, C, H, W] -> [A, C, H, W].
    """
    if len(positions) == 0:
        return images
    if len(positions) == len(images):
        return function(images)
    where = positions.to(images.device, non_blocking=True)
    return images.index_copy_(0, where, function(images.index_select(0, where)))


def plain(images: Tensor, size: int) -> Tensor:
    """The image without augmentation at size x size pixels (uint8 or float, [C, H, W] or [B, C, H, W]; dtype is kept).

    Already size x size: untouched. Else the shorter side is resized to R = round(size * 256 / 224) where it has at
    least R pixels, and to `size` itself (which may enlarge) where not; then the central size x size is cut. Bilinear
    with antialias.
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    enough = round(size * _PLAIN_SHARE)
    shorter = enough if min(height, width) >= enough else size
    longer = int(shorter * max(height, width) / min(height, width))
    resized = resize(images, (shorter, longer) if height <= width else (longer, shorter))
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return resized[..., top : top + size, left : left + size].contiguous()


def resize(images: Tensor, size: tuple[int, int], *, interpolation: str = "bilinear", antialias: bool = True) -> Tensor:
    """Resize all images alike to (height, width), as torchvision does; uint8 or float, [C, H, W] or [B, C, H, W].

    uint8 is rounded (and with bicubic clamped) after each axis, so at hard edges it can differ from floats by a few
    255ths, as it does in torchvision and PIL.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    batch = images if images.dim() == 4 else images.unsqueeze(0)
    native = images.dtype != torch.uint8 or images.device.type == "cpu"  # no uint8 kernel on GPUs
    out = F.interpolate(
        batch if native else as_float(batch), size=size, mode=interpolation, align_corners=False, antialias=antialias
    )
    if out.is_floating_point() and interpolation == "bicubic":
        out = out.clamp_(0, 1)  # cubic kernels overshoot
    out = out if native else as_bytes(out)
    return out if images.dim() == 4 else out.squeeze(0)


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    size: int,
    *,
    interpolation: str = "bilinear",
    antialias: bool = True,
    mirrored: Tensor | None = None,
) -> Tensor:
    """Part `boxes` of every image at size x size pixels, mirrored left to right where said.

    boxes: [B, 4] top, left, height, width, inside the image. mirrored: bool [B]. Equals torchvision's resized_crop
    image by image, with bicubic results clamped to [0, 1]. Returns a new tensor [B, C, size, size].
    """
    height, width = images.shape[-2:]
    top, left, h, w = boxes.to(torch.float64).unbind(1)
    rows = _axis_weights(top, h, (height, size), interpolation, antialias, None)
    columns = _axis_weights(left, w, (width, size), interpolation, antialias, mirrored)
    device = images.device
    out = _resample(images, rows(device), columns(device))
    return out.clamp_(0, 1) if interpolation == "bicubic" else out


def _axis_weights(
    start: Tensor,
    length: Tensor,
    sides: tuple[int, int],
    interpolation: str,
    antialias: bool,
    mirrored: Tensor | None,
) -> Callable[[torch.device], Tensor]:
    """Weights [B, out, in] of one axis, whose part [start, start + length) becomes the whole output."""
    side_in, side_out = sides
    scale = (length / side_out).unsqueeze(1)  # [B, 1]
    steps = torch.arange(side_out, dtype=torch.float64) + 0.5
    if mirrored is not None:
        steps = torch.where(mirrored.unsqueeze(1), side_out - steps, steps)  # [B, out]
    centres = start.unsqueeze(1) + scale * steps  # [B, out], in input pixels, whose centres lie at j + 0.5
    reach = scale.clamp_min(1)  # antialias: the kernel widens where pixels are merged
    ends = torch.stack((start, start + length), 1)  # [B, 2]

    def weights(device: torch.device) -> Tensor:
        c, r, e = (t.to(torch.float32).to(device, non_blocking=True).unsqueeze(-1) for t in (centres, reach, ends))
        pixels = torch.arange(side_in, device=device, dtype=torch.float32) + 0.5  # [in]
        if not antialias:
            return _point_weights(c, e, pixels, interpolation)
        kernel = _triangle if interpolation == "bilinear" else _cubic
        table = kernel((pixels - c).abs_().div_(r))  # [B, out, in]
        table.mul_(((pixels > e[:, :1]) & (pixels < e[:, 1:])).to(table.dtype))  # nothing from outside the part
        return table.div_(table.sum(-1, keepdim=True))

    return weights


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1).clamp_min_(0)


def _cubic(distance: Tensor, a: float = -0.5) -> Tensor:
    """Keys's cubic kernel of |distance|; torch takes a = -0.5 with antialias and -0.75 without.

    With p = max(0, 1 - d) and q = max(0, 2 - d) both pieces are one polynomial, a (1 - q) q^2 + (4 a + 3 - 2 p) p^2.
    """
    p, q = (1 - distance).clamp_min_(0), (2 - distance).clamp_min_(0)
    inner = (4 * a + 3 - 2 * p).mul_(p).mul_(p)
    return (1 - q).mul_(q).mul_(q).mul_(a).add_(inner)


def _point_weights(centres: Tensor, ends: Tensor, pixels: Tensor, interpolation: str) -> Tensor:
    """Weights [B, out, in] without antialias: two or four neighbours, edge pixels of the part repeated beyond it."""
    first, last = ends[:, :1] + 0.5, ends[:, 1:] - 0.5  # centres of the part's outer pixels
    if interpolation == "bilinear":
        return _triangle((pixels - torch.minimum(torch.maximum(centres, first), last)).abs_())
    base = torch.floor(centres - 0.5) + 0.5  # the pixel centre at or before
    table = torch.zeros(*centres.shape[:2], len(pixels), device=pixels.device)
    for tap in (-1, 0, 1, 2):
        neighbour = base + tap
        weight = _cubic((centres - neighbour).abs_(), a=-0.75)  # [B, out, 1]
        table += weight * (pixels == torch.minimum(torch.maximum(neighbour, first), last))
    return table


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The product rows [B, h, H] @ images [B, C, H, W] @ columns [B, w, W]^T -> [B, C, h, w]."""
    b, c, height, width = images.shape
    across = torch.bmm(images.reshape(b, c * height, width), columns.transpose(1, 2))  # [B, C H, w]
    return torch.matmul(rows.unsqueeze(1), across.view(b, c, height, -1))


def pad_and_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Window of the images' own size out of the image with a black border; uint8 or float.

    offsets: int64 [B, 2], top and left in the padded image, in 0 ... 2 padding. Returns a new tensor [B, C, H, W].
    """
    height, width = images.shape[-2:]
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, places, places, H, W]
    top, left = offsets.to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor) -> Tensor:
    """Every image mirrored left to right."""
    return images.flip(-1)


def rotate90(images: Tensor, turns: Tensor) -> Tensor:
    """Every (square) image turned counter-clockwise by its number of quarter turns, [B] in 0 ... 3.

    May write in place.
    """
    for count in (1, 2, 3):
        turn = partial(torch.rot90, k=count, dims=(2, 3))
        images = change(images, (turns == count).nonzero().flatten(), turn)
    return images


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of every image with its own sigma [B] (pixels) and a window of `kernel` pixels, reflected borders.

    kernel: odd, with kernel // 2 smaller than the image. Returns a new tensor.
    """
    radius = kernel // 2
    if kernel % 2 == 0 or radius >= min(images.shape[-2:]):
        raise ValueError(f"kernel {kernel} must be odd and at most twice the image less one ({tuple(images.shape)})")
    sigma = sigmas.to(torch.float32).to(images.device, non_blocking=True).unsqueeze(1)  # [B, 1]
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    taps = torch.softmax(-0.5 * (offsets / sigma) ** 2, dim=1)  # [B, kernel]
    # On a GPU the dense product is fast at these sizes, and cuDNN would use TF32 and tune itself for every batch size.
    return _blur_by_convolution(images, taps) if images.device.type == "cpu" else _blur_by_product(images, taps)


def _blur_by_convolution(images: Tensor, taps: Tensor) -> Tensor:
    """Columns, then rows, with one convolution group for every image and channel."""
    b, c, height, width = images.shape
    kernel = taps.shape[1]
    padded = F.pad(images, (kernel // 2,) * 4, mode="reflect").flatten(0, 1).unsqueeze(0)  # [1, B C, H', W']
    weights = taps.repeat_interleave(c, 0)  # [B C, kernel]
    down = F.conv2d(padded, weights.view(-1, 1, kernel, 1), groups=b * c)
    return F.conv2d(down, weights.view(-1, 1, 1, kernel), groups=b * c).view(b, c, height, width)


def _blur_by_product(images: Tensor, taps: Tensor) -> Tensor:
    """The same with banded matrices."""
    radius = taps.shape[1] // 2
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    rows, columns = ((taps @ _reflected(side, offsets)).view(-1, side, side) for side in images.shape[-2:])
    return _resample(images, rows, columns)


def _reflected(side: int, offsets: Tensor) -> Tensor:
    """Which pixel each tap reads: [taps, side * side], 1 where output i (major) reads input j under that offset."""
    pixels = torch.arange(side, device=offsets.device)
    read = (pixels + offsets.unsqueeze(1)).abs_()  # [taps, side]
    read = torch.where(read < side, read, 2 * (side - 1) - read)
    return (read.unsqueeze(-1) == pixels).flatten(1).to(torch.float32)


def solarise(images: Tensor, threshold: float) -> Tensor:
    """Values at or above the threshold become 1 - x."""
    return torch.where(images >= threshold, 1 - images, images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    """(x - mean) / std per channel; [B, C, H, W], into `out` where given."""
    shift, scale = (
        torch.tensor(v, dtype=torch.float32).view(-1, 1, 1).to(images.device, non_blocking=True) for v in (mean, std)
    )
    return torch.sub(images, shift, out=out).div_(scale)
