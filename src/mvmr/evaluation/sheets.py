"""Sheets of pictures: rows of images of one size, with captions, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from mvmr.data.images import ImageSource
from mvmr.data.loading import plain_batches
from mvmr.errors import UserError
from mvmr.evaluation.attention import GAP, HEAT
from mvmr.ops.files import write_whole

CAPTION = 14
"""Height in pixels of a line of text below a picture."""


def images_of(source: ImageSource, size: int) -> Tensor:
    """All images [N, 3, S, S] uint8 of a source that a sheet has room for."""
    return torch.cat([images for _, images in plain_batches(source, batch_size=64, size=size)])


def picture(image: Tensor, side: int) -> Image.Image:
    """[3, H, W], uint8 or float in [0, 1], with a shorter side of `side` pixels; enlarged without smoothing."""
    values = image.detach().cpu()
    if values.is_floating_point():
        values = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = values.shape[-2:]
    scale = side / min(height, width)
    kernel = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    whole = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    return whole.resize((round(width * scale), round(height * scale)), kernel)


def heat(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map [h, w] of values in [0, 1] as colours, from dark to bright, enlarged bilinearly to (width, height)."""
    grown = functional.interpolate(values.detach().float().cpu()[None, None], size[::-1], mode="bilinear")[0, 0]
    stops = [stop for stop, _ in HEAT]
    channels = [np.interp(grown.numpy(), stops, [colour[c] for _, colour in HEAT]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def write_sheet(
    path: str | Path, rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]] = ()
) -> Path:
    """Write rows of pictures of one size as a PNG, with a line of text below each where there are captions.

    The folder is made if it is missing. Raises ValueError for no picture, UserError where the path is a folder, and
    RunError where it cannot be written.
    """
    if not rows or not rows[0]:
        raise ValueError("a sheet needs a picture")
    width, height = rows[0][0].size
    below = CAPTION if captions else 0
    across, down = width + GAP, height + below + GAP
    sheet = Image.new("RGB", (across * max(map(len, rows)) - GAP, down * len(rows) - GAP), color=(255, 255, 255))
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, pictures in enumerate(rows):
        for column, each in enumerate(pictures):
            sheet.paste(each, (column * across, row * down))
            if captions:
                write.text((column * across, row * down + height + 1), captions[row][column], fill=(0, 0, 0), font=font)
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name the PNG to write")
    write_whole(
        file, lambda stream: sheet.save(stream, format="PNG", optimize=True),
        remedy="make room on the disk, or name a file in another folder",
    )  # fmt: skip
    return file
