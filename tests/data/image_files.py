"""Small image files of every format and mode that people have, and broken ones, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Four blocks of colour: red, green / blue, and dark yellow; far apart, so that JPEG's losses cannot confuse them.
BLOCKS = np.array([[[200, 30, 40], [20, 180, 60]], [[30, 50, 220], [120, 110, 10]]], dtype=np.uint8)


def pixels(height: int = 32, width: int = 48) -> np.ndarray:
    """[height, width, 3] uint8: the four blocks."""
    return BLOCKS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def grey(height: int = 32, width: int = 48) -> np.ndarray:
    """[height, width] uint8: a ramp from 0 to 255, left to right."""
    return np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))


def _rgb(folder: Path) -> None:
    image = Image.fromarray(pixels())
    image.save(folder / "rgb.jpg", quality=95, subsampling=0)
    image.save(folder / "rgb.PNG")  # endings in capitals count too
    image.save(folder / "rgb.webp", lossless=True)
    image.save(folder / "rgb.bmp")
    image.save(folder / "rgb.tif")
    image.save(folder / "rgb_lzw.tiff", compression="tiff_lzw")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "frames.gif", save_all=True, append_images=[
        Image.fromarray(255 - pixels())
    ])  # fmt: skip
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95, subsampling=0)
    image.convert("CMYK").save(folder / "cmyk.tif")


def _transparent(folder: Path) -> None:
    # The left half is opaque, the right half is not there; white is what decode() lays it on.
    alpha = np.full((32, 48), 255, dtype=np.uint8)
    alpha[:, 24:] = 0
    image = Image.fromarray(np.dstack([pixels(), alpha]))
    image.save(folder / "alpha.png")
    image.save(folder / "alpha.webp", lossless=True)
    image.save(folder / "alpha.tif")
    Image.fromarray(np.dstack([grey(), alpha])).save(folder / "grey_alpha.png")
    indices = np.zeros((32, 48), dtype=np.uint8)
    indices[:, 24:] = 1
    palette = Image.fromarray(indices)
    palette.putpalette([200, 30, 40, 0, 0, 0])
    palette.save(folder / "palette_alpha.png", transparency=1)
    palette.save(folder / "palette_alpha.gif", transparency=1)


def _grey(folder: Path) -> None:
    Image.fromarray(grey()).save(folder / "grey.png")
    Image.fromarray(grey()).save(folder / "grey.jpg", quality=95)
    Image.fromarray(grey() > 127).save(folder / "one_bit.png")
    Image.fromarray(grey() > 127).save(folder / "one_bit.tif")
    wide = grey().astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / "grey16.png")
    Image.fromarray(wide).save(folder / "grey16.tif")
    Image.fromarray(wide.astype(np.int32)).save(folder / "grey32.tif")
    Image.fromarray(grey().astype(np.float32) / 255).save(folder / "float.tif")


def _turned(folder: Path) -> None:
    upright = Image.fromarray(pixels())
    # What the camera stored, such that the tag sets it upright.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(folder / f"turned{orientation}.jpg", exif=exif, quality=95, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored[6].save(folder / "turned.png", exif=exif)
    stored[6].save(folder / "turned.webp", exif=exif, lossless=True)
    stored[6].save(folder / "turned.tif", exif=exif)


def write_good(folder: Path) -> list[Path]:
    """One file of every format and mode, all readable."""
    folder.mkdir(parents=True, exist_ok=True)
    for maker in (_rgb, _transparent, _grey, _turned):
        maker(folder)
    return sorted(folder.iterdir())


def write_bad(folder: Path) -> list[Path]:
    """Files with an image's ending that cannot be read: truncated in every format, empty, and no images at all."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for ending in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        whole = folder / f"truncated.{ending}"
        Image.fromarray(noise).save(whole)
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image at all\n")
    (folder / "page.png").write_text("<html><body>404</body></html>")
    (folder / "zeros.webp").write_bytes(bytes(1000))
    holes = grey().astype(np.float32)
    holes[3, 4] = np.nan
    Image.fromarray(holes).save(folder / "nan.tif")
    return sorted(folder.iterdir())


def write_mixed(root: Path, count: int = 500) -> tuple[list[Path], list[Path]]:
    """A tree of `count` files: (good, bad), paths sorted; every good and bad kind is there at least once."""
    kinds, broken = write_good(root / "kinds"), write_bad(root / "broken" / "below")
    generator = np.random.default_rng(1)
    good = list(kinds)
    for number in range(count - len(kinds) - len(broken)):
        folder = root / f"photos {number % 7}"
        folder.mkdir(exist_ok=True)
        height, width = generator.integers(20, 90, 2)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        path = folder / f"{number:04d}.{('jpg', 'png', 'webp', 'bmp')[number % 4]}"
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
        good.append(path)
    return sorted(good), sorted(broken)
