"""Image files of any common format as uint8 RGB tensors."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Endings, in lower case, of the files that count as images; others in a tree are passed over."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # never EPS and its like, which start other programs

ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its EXIF orientation (EXIF 2.32, tag 274)."""


class UnreadableImage(ValueError):
    """A file that is no image, or a broken one. Travels between processes whole."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(path: Path | str) -> Tensor:
    """The image in a file, upright by its EXIF orientation: [3, H, W] uint8, RGB.

    JPEG, PNG, WebP, BMP, TIFF and GIF (first frame). Transparent pixels are laid on white. 16-bit grey is divided by
    257; other integers and floats are scaled by `_scale_of`, which looks at the range of the image.
    Raises UnreadableImage for a file that is missing, empty, truncated, no image, or over Pillow's limit of pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF and the like: the pixels decide
            with Image.open(path, formats=FORMATS) as image:
                return _pixels(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly every type of error on broken files
        raise UnreadableImage(str(path), _reason(path, error)) from None


def _pixels(image: Image.Image) -> Tensor:
    image.load()
    if 0 in image.size:
        raise ValueError(f"no pixels: {image.width} x {image.height}")
    turn = UPRIGHT.get(_orientation(image))
    values = _rgb(image)  # [H, W, 3] or [H, W]
    if turn is not None:
        values = np.asarray(Image.fromarray(values).transpose(turn))
    pixels = torch.from_numpy(np.array(values, order="C"))
    if pixels.ndim == 2:
        return pixels.expand(3, -1, -1).contiguous()
    return pixels.permute(2, 0, 1).contiguous()


def _orientation(image: Image.Image) -> int:
    # Asked for after load(): PNG may hold it behind the pixels, and Pillow turns TIFF upright by itself while loading.
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] for grey images without transparency, [H, W, 3] for others."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return _to_8_bit(np.asarray(image), sixteen=mode.startswith("I;16"))
    if mode in ALPHA or "transparency" in image.info:
        image = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def _to_8_bit(values: np.ndarray, *, sixteen: bool) -> np.ndarray:
    # Pillow's own conversion would clip everything above 255 to white.
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    wide = values.astype(np.float64)
    low, high = (0.0, 65535.0) if sixteen else _scale_of(wide, integers=values.dtype.kind in "iu")
    return np.rint((wide - low) * (255 / (high - low))).astype(np.uint8)


def _scale_of(values: np.ndarray, *, integers: bool) -> tuple[float, float]:
    """The values that become 0 and 255: the smallest usual range that holds the image, else its own.

    Integers: 16 bits. Floats: [0, 1], 8 bits, 16 bits. Files do not say which one was meant.
    """
    lowest, highest = float(values.min()), float(values.max())
    if lowest >= 0:
        for top in (65535.0,) if integers else (1.0, 255.0, 65535.0):
            if highest <= top:
                return 0.0, top
    return lowest, max(highest, np.nextafter(lowest, np.inf))


def _reason(path: Path | str, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "has more pixels than Pillow's limit against decompression bombs"
    if isinstance(error, UnidentifiedImageError):
        try:
            return "not an image of a known format" if os.path.getsize(path) else "the file is empty"
        except OSError as gone:
            return f"cannot be opened: {gone.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith(("no pixels", "holds values", "image file is truncated")) else f"broken: {text}"
