"""COCO's masks: polygons by their definition, run lengths against COCO's own tool and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mvmr.data.coco_masks import polygons_to_mask, rle_to_mask, to_mask
from mvmr.types import UserError


def test_a_square_is_its_own_pixels() -> None:
    mask = polygons_to_mask([[2, 1, 7, 1, 7, 5, 2, 5]], 8, 9)
    expected = np.zeros((8, 9), dtype=bool)
    expected[1:5, 2:7] = True
    assert (mask == expected).all()
    assert (polygons_to_mask([[2, 5, 7, 5, 7, 1, 2, 1]], 8, 9) == expected).all()  # the other way round


def inside(x: float, y: float, corners: np.ndarray) -> bool:
    """Even-odd rule, by the angle that the outline turns around a point that lies on no edge."""
    ahead = np.roll(corners, -1, axis=0)
    first, second = np.arctan2(corners[:, 1] - y, corners[:, 0] - x), np.arctan2(ahead[:, 1] - y, ahead[:, 0] - x)
    turns = (second - first + np.pi) % (2 * np.pi) - np.pi
    return round(turns.sum() / (2 * np.pi)) % 2 == 1


@pytest.mark.parametrize("seed", range(4))
def test_any_polygon_holds_the_centres_inside_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    polygons = [generator.uniform(-4, 24, 2 * corners) for corners in (3, 5, 9)]  # they cross themselves and the border
    expected = np.array(
        [[any(inside(x + 0.5, y + 0.5, p.reshape(-1, 2)) for p in polygons) for x in range(19)] for y in range(17)]
    )
    assert 0.05 < expected.mean() < 0.95
    assert (polygons_to_mask([p.tolist() for p in polygons], 17, 19) == expected).all()


def test_a_smooth_outline_has_the_area_that_a_fine_drawing_has() -> None:
    angles = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    corners = np.stack([30.3 + 21.7 * np.cos(angles), 25.1 + 17.2 * np.sin(angles)], 1)
    fine = Image.new("1", (640, 520))
    ImageDraw.Draw(fine).polygon([tuple(corner) for corner in corners * 10], fill=1)
    mask = polygons_to_mask([corners.reshape(-1).tolist()], 52, 64)
    assert mask.sum() == pytest.approx(np.asarray(fine).sum() / 100, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_of_both_kinds(seed: int) -> None:
    mask_tool = pytest.importorskip("faster_coco_eval.core.mask")
    generator = np.random.default_rng(seed)
    drawn = generator.random((23, 37)) < (0.5, 0.02, 0.98)[seed]
    runs, value = [0], False
    for pixel in drawn.T.reshape(-1):  # column by column
        if pixel != value:
            runs.append(0)
            value = bool(pixel)
        runs[-1] += 1
    assert (rle_to_mask({"size": [23, 37], "counts": runs}, 23, 37) == drawn).all()
    packed = mask_tool.encode(np.asfortranarray(drawn.astype(np.uint8)))
    assert (rle_to_mask(packed, 23, 37) == drawn).all()
    text = {"size": [23, 37], "counts": packed["counts"].decode()}
    assert (to_mask(text, 23, 37) == drawn).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [4, 6], "counts": [24]}, r"size \[4, 6\], its image \[4, 5\]"),
        ({"size": [4, 5], "counts": [7, 7]}, "do not fill its 4 x 5 pixels"),
        ({"size": [4, 5], "counts": [25, -5]}, "do not fill"),
        ({"size": [4, 5], "counts": None}, "neither a list of lengths nor"),
        ({"size": [4, 5], "counts": "\x01"}, "a letter that"),
        ({"size": [4, 5], "counts": "P"}, "cut short"),
        ([[1, 2, 3, 4]], "4 numbers; it needs x and y of three corners"),
        ([[1, 2, 3, 4, 5, float("nan")]], "three corners or more"),
        ([["a", 2, 3, 4, 5, 6]], "no number"),
        (None, "NoneType, neither polygons nor run lengths"),
    ],
)
def test_what_is_no_mask_is_refused(segmentation: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_mask(segmentation, 4, 5)
