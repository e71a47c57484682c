"""Every format and mode comes out in the right colours; broken files say why."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_files import grey, pixels, write_bad, write_good
from mvmr.data.decode import UnreadableImage, decode

WHITE = np.array([255, 255, 255], dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_good(folder)
    return folder


def read(path: Path) -> np.ndarray:
    """[H, W, 3] int, after checks of type and layout."""
    image = decode(path)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    return image.permute(1, 2, 0).numpy().astype(int)


def rgb_of(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2).astype(int)


def half_white(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[:, 24:] = WHITE
    return values


def inside(values: np.ndarray) -> np.ndarray:
    """The blocks without their edges, where JPEG rings."""
    return np.concatenate([values[i : i + 8, j : j + 12].reshape(-1, 3) for i in (4, 20) for j in (6, 30)])


@pytest.mark.parametrize("name", ["rgb.PNG", "rgb.webp", "rgb.bmp", "rgb.tif", "rgb_lzw.tiff", "palette.png"])
def test_lossless_colours_are_exact(folder: Path, name: str) -> None:
    assert (read(folder / name) == pixels()).all()


def test_the_first_frame_of_a_gif_counts(folder: Path) -> None:
    assert (read(folder / "frames.gif") == pixels()).all()


@pytest.mark.parametrize(("name", "tolerance"), [("rgb.jpg", 6), ("cmyk.jpg", 8), ("cmyk.tif", 3)])
def test_lossy_colours_are_near(folder: Path, name: str, tolerance: int) -> None:
    assert abs(inside(read(folder / name)) - inside(pixels().astype(int))).max() <= tolerance


@pytest.mark.parametrize("name", ["alpha.png", "alpha.webp", "alpha.tif"])
def test_transparent_pixels_become_white(folder: Path, name: str) -> None:
    assert (read(folder / name) == half_white(pixels())).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (100, 0, 200, 128)).save(tmp_path / "half.png")
    expected = np.array([100, 0, 200]) * (128 / 255) + 255 * (127 / 255)
    assert abs(read(tmp_path / "half.png")[0, 0] - expected).max() <= 1


@pytest.mark.parametrize("name", ["palette_alpha.png", "palette_alpha.gif"])
def test_transparent_palette_entries_become_white(folder: Path, name: str) -> None:
    image = read(folder / name)
    assert (image[:, :24] == [200, 30, 40]).all()
    assert (image[:, 24:] == WHITE).all()


def test_a_transparent_colour_of_an_rgb_file_becomes_white(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "key.png", transparency=(200, 30, 40))
    image = read(tmp_path / "key.png")
    assert (image[:16, :24] == WHITE).all()
    assert (image[16:] == pixels()[16:]).all()


def test_grey_alpha(folder: Path) -> None:
    assert (read(folder / "grey_alpha.png") == half_white(rgb_of(grey()))).all()


@pytest.mark.parametrize("name", ["grey.png", "grey16.png", "grey16.tif", "grey32.tif", "float.tif"])
def test_grey_of_any_depth_is_the_same_image(folder: Path, name: str) -> None:
    assert (read(folder / name) == rgb_of(grey())).all()


def test_grey_jpeg(folder: Path) -> None:
    assert abs(read(folder / "grey.jpg") - rgb_of(grey())).max() <= 4


@pytest.mark.parametrize("name", ["one_bit.png", "one_bit.tif"])
def test_one_bit(folder: Path, name: str) -> None:
    assert (read(folder / name) == rgb_of(255 * (grey() > 127))).all()


def test_dark_16_bit_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2570, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert (read(tmp_path / "dark.png") == 10).all()


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_the_range_that_holds_them(tmp_path: Path, top: float) -> None:
    values = np.linspace(0, top, 48, dtype=np.float32)[None].repeat(4, 0)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert (read(tmp_path / "float.tif") == rgb_of(np.rint(values / top * 255))).all()


def test_other_floats_are_stretched(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-5, 0, 5]], dtype=np.float32)).save(tmp_path / "signed.tif")
    assert read(tmp_path / "signed.tif")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.full((2, 2), -5, dtype=np.float32)).save(tmp_path / "constant.tif")
    assert (read(tmp_path / "constant.tif") == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(folder: Path, orientation: int) -> None:
    image = read(folder / f"turned{orientation}.jpg")
    assert image.shape == (32, 48, 3)
    assert abs(inside(image) - inside(pixels().astype(int))).max() <= 6


@pytest.mark.parametrize("name", ["turned.png", "turned.webp", "turned.tif"])
def test_orientation_in_other_formats_is_applied_once(folder: Path, name: str) -> None:
    assert (read(folder / name) == pixels()).all()


REASONS = {
    "empty.jpg": "the file is empty",
    "empty.png": "the file is empty",
    "text.jpg": "not an image of a known format",
    "page.png": "not an image of a known format",
    "zeros.webp": "not an image of a known format",
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "truncated.bmp": "truncated",
    "nan.tif": "not finite",
}


def test_broken_files_say_why(tmp_path: Path) -> None:
    for path in write_bad(tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UnreadableImage) as caught:
                decode(path)
        assert caught.value.path == str(path)
        assert REASONS.get(path.name, "") in caught.value.reason
        assert "\n" not in caught.value.reason
        assert caught.value.reason


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        decode(tmp_path / "missing.jpg")
    with pytest.raises(UnreadableImage, match="directory"):
        decode(tmp_path)


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode(tmp_path / "bomb.png")


def test_formats_that_start_other_programs_are_refused(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    with pytest.raises(UnreadableImage, match="known format"):
        decode(tmp_path / "page.png")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "broken")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "broken", "a.jpg: broken")


def test_broken_exif_does_not_hide_the_pixels(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "a.jpg").shape == (32, 48, 3)
