"""HOG against a loop over pixels, its symmetries, and scikit-image.

hog_small.npz holds a 64 x 64 crop of a photograph (`crop`) and features from scikit-image (BSD-3-Clause licence).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.feature import hog as skimage_hog

from mvmr.representations import HOG
from mvmr.types import UserError


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """[1, 1, 64, 64] in [0, 1], float64."""
    return torch.from_numpy(np.load(Path(__file__).parent / "hog_small.npz")["crop"])[None, None]


def slow_hog(image: np.ndarray, bins: int, cell: int, variant: str) -> np.ndarray:
    """[H, W] to [bins, H // cell, W // cell], pixel by pixel in float64."""
    height, width = image.shape
    padded = np.zeros((height + 2, width + 2))
    padded[1:-1, 1:-1] = image
    histogram = np.zeros((bins, height // cell, width // cell))
    for row in range(height // cell * cell):
        for column in range(width // cell * cell):
            window = padded[row : row + 3, column : column + 3]
            gx = window[0, 0] + 2 * window[1, 0] + window[2, 0] - window[0, 2] - 2 * window[1, 2] - window[2, 2]
            gy = window[0, 0] + 2 * window[0, 1] + window[0, 2] - window[2, 0] - 2 * window[2, 1] - window[2, 2]
            magnitude, position = math.hypot(gx, gy), math.atan2(gx, gy) / math.pi * bins
            part = position - math.floor(position)
            low, high = (
                (magnitude * (1 - part), magnitude * part) if variant == "correct" else (magnitude, 1 - magnitude)
            )
            histogram[math.floor(position) % bins, row // cell, column // cell] += low
            histogram[math.ceil(position) % bins, row // cell, column // cell] += high
    return histogram / cell**2


@pytest.mark.parametrize("variant", ["correct", "official"])
@pytest.mark.parametrize(("bins", "cell", "height", "width"), [(24, 8, 32, 32), (9, 5, 23, 17), (2, 1, 4, 3)])
def test_equals_a_loop_over_pixels(variant, bins, cell, height, width):
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    maps = HOG(bins=bins, cell=cell, variant=variant).maps(images)
    assert maps.shape == (2, 3, bins, height // cell, width // cell)
    for image, colour in [(0, 0), (1, 2)]:
        expected = slow_hog(images[image, colour].double().numpy(), bins, cell, variant)
        assert np.abs(maps[image, colour].numpy() - expected).max() < 1e-4


def test_bins_of_a_pixel_sum_to_its_magnitude(photograph):
    image = photograph[0, 0].numpy()
    padded = np.pad(image, 1)
    smooth_rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    magnitude = np.hypot(smooth_rows[:, :-2] - smooth_rows[:, 2:], smooth_columns[:-2] - smooth_columns[2:])
    maps = HOG(cell=1).maps(photograph)[0, 0]
    assert np.abs(maps.sum(0).numpy() - magnitude).max() < 1e-5
    assert (maps >= 0).all()
    assert ((maps > 0).sum(0) <= 2).all()


def test_official_bins_of_a_pixel_sum_to_one(photograph):
    normalised = (photograph - 0.45) / 0.22
    maps = HOG(cell=1, variant="official").maps(normalised)
    assert torch.allclose(maps.sum(2), torch.ones(()), atol=1e-5)
    negative = (HOG(variant="official").maps(normalised) < 0).double().mean()
    assert 0.05 < negative < 0.5
    assert (HOG(variant="official").maps(torch.zeros(1, 3, 8, 8))[:, :, 0] == 1).all()  # flat: all in the first bin


@pytest.mark.parametrize("variant", ["correct", "official"])
def test_quarter_turn_shifts_the_bins_by_half(variant):
    images = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    hog = HOG(variant=variant)
    maps, turned = hog.maps(images), hog.maps(images.rot90(1, (2, 3)))
    expected = maps.roll(12, 2).rot90(1, (3, 4))
    assert torch.allclose(turned, expected, atol=1e-5)
    assert not torch.allclose(turned, maps.rot90(1, (3, 4)), atol=1e-2)


@pytest.mark.parametrize("step", [2, 7])
def test_one_edge_fills_one_orientation(step):
    """A ramp along `angle` has its gradient there: the bin is 24 (90 - angle) / 180, unsigned."""
    angle = math.pi * step / 24
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = (x * math.cos(angle) + y * math.sin(angle))[None, None]
    middle = HOG(cell=8).maps(ramp)[0, 0, :, 1, 1]
    assert int(middle.argmax()) == (12 - step) % 24
    assert middle.max() / middle.sum() > 0.999


def test_follows_scikit_image(photograph):
    """There, nine bins of 20 degrees without interpolation; here each is 10 of our 90. Blurred, as gradients differ."""
    blurred = torch.from_numpy(gaussian_filter(photograph.numpy(), (0, 0, 2, 2)))
    reference = skimage_hog(blurred[0, 0].numpy(), 9, (8, 8), (1, 1), "L2", feature_vector=False)[
        :, :, 0, 0
    ]  # [8, 8, 9]
    fine = HOG(bins=90).maps(blurred)[0, 0]  # [90, 8, 8]; bin i is the gradient at 90 - 2 i degrees
    fine = (fine + fine.roll(1, 0)) / 2  # now at 91 - 2 i
    ours = torch.stack([sum(fine[(45 - 10 * k - i) % 90] for i in range(10)) for k in range(9)], -1)  # [8, 8, 9]
    ours = (ours / ours.norm(dim=-1, keepdim=True)).numpy()[1:-1, 1:-1]
    reference = (reference / np.linalg.norm(reference, axis=-1, keepdims=True))[1:-1, 1:-1]
    likeness = [np.corrcoef(np.roll(ours, shift, -1).ravel(), reference.ravel())[0, 1] for shift in range(9)]
    assert likeness[0] > 0.99
    assert max(likeness[1:]) < 0.5


def test_values_that_are_no_numbers_stay_visible():
    images = torch.zeros(1, 3, 8, 8)
    images[0, 1, 4, 4] = torch.nan
    features = HOG().maps(images)
    assert features[0, 1].isnan().any()
    assert features[0, 0].isfinite().all()


def test_settings_and_sizes_out_of_range():
    with pytest.raises(UserError, match=r"hog\.cell"):
        HOG()(torch.zeros(1, 3, 7, 32))
    with pytest.raises(UserError, match="bins"):
        HOG(bins=1)
    with pytest.raises(UserError, match="variant"):
        HOG(variant="exact")
