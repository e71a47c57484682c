"""Each corruption against another implementation or by hand, and as a function of seed and index alone."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import skimage.color
import torch
from PIL import Image
from torch import Tensor

from mvmr.evaluation import corruptions
from mvmr.evaluation.corruptions import (
    CORRUPTIONS,
    LEVELS,
    SEVERITIES,
    brightness,
    corrupt,
    gaussian_blur,
    gaussian_noise,
    jpeg,
    levels_for,
    normal,
)


def drawn(count: int = 6, height: int = 20, width: int = 20, seed: int = 0) -> Tensor:
    """Smooth images with an edge, in all three colours: [N, 3, H, W] uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    images[..., width // 2 :] = 1 - images[..., width // 2 :]
    return (images * 255).round().to(torch.uint8)


INDEX = torch.arange(6)


def test_every_table_has_five_levels_that_grow_in_strength() -> None:
    for table in LEVELS.values():
        assert tuple(table) == CORRUPTIONS
        for name, levels in table.items():
            assert len(levels) == 5
            rising = list(levels) if name != "jpeg" else [-level for level in levels]
            assert rising == sorted(set(rising))
    assert [levels_for(side) for side in (16, 32, 48, 64, 96, 128, 224)] == (
        ["cifar"] * 2 + ["tiny_imagenet"] * 3 + ["imagenet"] * 2
    )


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_pure_function_of_seed_index_corruption_and_severity(name: str) -> None:
    images = drawn()
    whole = corrupt(images, INDEX, name, 3, seed=5)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    for batch in (1, 4):
        parts = [corrupt(images[i : i + batch], INDEX[i : i + batch], name, 3, seed=5) for i in range(0, 6, batch)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(corrupt(images[order], order, name, 3, seed=5), whole[order])
    same = images[:1].expand(6, -1, -1, -1)
    random = name == "gaussian_noise"
    assert torch.equal(corrupt(images, INDEX, name, 3, seed=6), whole) is not random
    assert torch.equal(corrupt(same, INDEX, name, 3)[0], corrupt(same, INDEX, name, 3)[1]) is not random
    assert torch.equal(corrupt(images, INDEX, name, 0), images)
    assert len(corrupt(images[:0], INDEX[:0], name, 3)) == 0


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("levels", LEVELS)
def test_each_severity_is_farther_from_the_image(name: str, levels: str) -> None:
    images = drawn(64, 32, 32)
    index = torch.arange(64)
    far = [
        (corrupt(images, index, name, severity, levels=levels).double() - images.double()).square().mean().item()
        for severity in (0, *SEVERITIES)
    ]
    assert far[0] == 0
    assert far == sorted(set(far))


def test_auto_takes_the_table_of_the_side() -> None:
    for side, table in ((32, "cifar"), (64, "tiny_imagenet"), (150, "imagenet")):
        images = drawn(1, side, side + 40)
        assert torch.equal(
            corrupt(images, INDEX[:1], "brightness", 2), corrupt(images, INDEX[:1], "brightness", 2, levels=table)
        )


def test_noise_has_its_moments() -> None:
    grey = torch.full((40, 3, 25, 25), 128, dtype=torch.uint8)  # odd in number, so that a pair is cut
    changed = gaussian_noise(grey, torch.arange(40), 0.1).double() / 255 - 128 / 255
    count = changed.numel()
    assert changed.mean().item() == pytest.approx(0, abs=4 * 0.1 / math.sqrt(count))
    # Rounding to 255ths adds the variance of a uniform error.
    expected = math.sqrt(0.1**2 + (1 / 255) ** 2 / 12)
    assert changed.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * count))
    rows = changed.flatten(1)
    correlation = torch.corrcoef(rows)[~torch.eye(40, dtype=torch.bool)]
    assert correlation.abs().max() < 5 / math.sqrt(rows.shape[1])  # images have noise of their own
    assert torch.equal(gaussian_noise(grey, torch.arange(40), 0.0), grey)
    other = gaussian_noise(grey, torch.arange(40), 0.1, draw=1).double() / 255 - 128 / 255
    assert abs((changed * other).mean().item()) < 5 * 0.01 / math.sqrt(count)


def test_normal_numbers_are_normal() -> None:
    values = normal(3, 0, torch.arange(50), 2001)
    assert values.shape == (50, 2001)
    assert scipy.stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    pairs = values[:, :2000].unflatten(1, (-1, 2))
    assert abs((pairs[..., 0] * pairs[..., 1]).mean().item()) < 5 / math.sqrt(50_000)
    assert torch.equal(normal(3, 0, torch.tensor([7]), 10)[0], values[7, :10])


def test_noise_is_clipped_and_independent_of_how_much_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    white = torch.full((6, 3, 20, 20), 255, dtype=torch.uint8)
    changed = gaussian_noise(white, INDEX, 0.2)
    assert changed.float().mean() == pytest.approx(255 * (1 - 0.2 / math.sqrt(2 * math.pi)), abs=1.5)
    assert (changed == 255).double().mean().item() == pytest.approx(0.5, abs=0.03)
    monkeypatch.setattr(corruptions, "_DRAWS", 1)
    assert torch.equal(gaussian_noise(white, INDEX, 0.2), changed)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5, 6.0])
def test_blur_is_scipys(sigma: float) -> None:
    images = drawn(2, 18, 27)
    reference = scipy.ndimage.gaussian_filter(
        images.numpy() / 255, (0, 0, sigma, sigma), mode="nearest", truncate=4.0
    )  # fmt: skip
    found = gaussian_blur(images, sigma)
    assert torch.equal(found, torch.from_numpy((reference * 255).round().astype(np.uint8)))
    assert not torch.equal(found, images)


def test_blur_at_its_limits() -> None:
    images = drawn()
    assert torch.equal(gaussian_blur(images, 0.0), images)
    assert torch.equal(gaussian_blur(images, 0.1), images)  # a window of one pixel
    even = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(gaussian_blur(even, 3.0), even)
    point = torch.zeros(1, 3, 41, 41, dtype=torch.uint8)
    point[..., 20, 20] = 255
    values = gaussian_blur(point, 1.0)[0, 0].double() / 255
    assert values[20, 20].item() == pytest.approx(1 / (2 * math.pi), abs=0.003)
    assert values.sum().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(values, values.T)


def test_brightness_by_hand() -> None:
    pixels = torch.tensor([[0, 0, 0], [100, 50, 0], [255, 128, 0], [250, 10, 10], [60, 60, 60]], dtype=torch.uint8)
    images = pixels.T.reshape(1, 3, 1, 5)
    found = brightness(images, 0.2)[0, :, 0].T.tolist()
    assert found[0] == [51, 51, 51]  # black becomes grey
    assert found[1] == [151, 76, 0]  # 100 + 51, and the others in proportion: 75.5 is rounded to even
    assert found[2] == [255, 128, 0]  # already as bright as can be
    assert found[3] == [255, 10, 10]
    assert found[4] == [111, 111, 111]
    for pixel, changed in zip(pixels.tolist(), found, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(each / 255 for each in pixel))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.2))
        assert changed == pytest.approx([255 * each for each in expected], abs=0.5 + 1e-9)
    assert torch.equal(brightness(drawn(), 0.0), drawn())


def test_brightness_is_scikit_images() -> None:
    images = drawn(4)
    hsv = skimage.color.rgb2hsv(images.permute(0, 2, 3, 1).numpy() / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    expected = torch.from_numpy(skimage.color.hsv2rgb(hsv) * 255).permute(0, 3, 1, 2)
    assert (brightness(images, 0.3) - expected).abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("quality", [80, 25, 7])
def test_jpeg_is_pillows_file(quality: int, tmp_path: Path) -> None:
    images = drawn(3, 24, 40)
    found = jpeg(images, quality)
    for image, changed in zip(images, found, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "image.jpg", quality=quality)
        with Image.open(tmp_path / "image.jpg") as read:
            assert read.mode == "RGB"
            assert (np.asarray(read) == changed.permute(1, 2, 0).numpy()).all()
    assert not torch.equal(found, images)


def test_jpeg_at_its_limits() -> None:
    even = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    assert torch.equal(jpeg(even, 10), even)
    grey = drawn()[:, :1].expand(-1, 3, -1, -1)  # colours lose half of their resolution at any quality
    best, worst = ((jpeg(grey, quality).double() - grey.double()).abs().mean() for quality in (95, 7))
    assert best < 1.5
    assert worst > 8


def test_what_is_refused() -> None:
    images = drawn()
    with pytest.raises(
        ValueError, match=r"no corruption 'gauss_blur' \(did you mean gaussian_blur.*known: gaussian_noise"
    ):
        corrupt(images, INDEX, "gauss_blur", 1)
    with pytest.raises(ValueError, match="severity is 6; it must be 1 to 5"):
        corrupt(images, INDEX, "jpeg", 6)
    with pytest.raises(ValueError, match=r"no levels 'cifr' \(did you mean cifar"):
        corrupt(images, INDEX, "jpeg", 1, levels="cifr")
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]; these are torch.float32"):
        corrupt(images / 255, INDEX, "jpeg", 1)
