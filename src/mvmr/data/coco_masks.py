"""The masks of COCO's annotations: polygons and run lengths, as they stand in its JSON, to arrays of truth values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mvmr.errors import UserError

Outline = Mapping[str, Any] | Sequence[Any]
"""What a mask is drawn from: run lengths, or polygons, each [x0, y0, x1, y1, ...]."""


def polygons_to_mask(polygons: Sequence[Sequence[float] | np.ndarray], height: int, width: int) -> np.ndarray:
    """[height, width] bool: the pixels whose centres lie in at least one polygon, each [x0, y0, x1, y1, ...].

    Pixel (row, column) covers [column, column + 1] x [row, row + 1], as in COCO. A polygon that crosses itself is
    filled by the even-odd rule; a centre on a left or upper edge is inside. Differs from COCO's own tool, which draws
    the outline too, by pixels at the border. Raises UserError for what is no polygon.
    """
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        mask |= _filled(_corners(polygon), height, width)
    return mask


def rle_to_mask(segmentation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """[height, width] bool of {"size": [height, width], "counts": ...}: lengths of runs of 0, 1, 0, ... down columns.

    counts: a list of lengths, or COCO's string of them. Raises UserError for another size and counts that do not fill
    the image.
    """
    size = segmentation.get("size")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise UserError(f"a mask has size {size}, its image [{height}, {width}]")
    counts = segmentation.get("counts")
    if isinstance(counts, str | bytes):
        counts = _lengths(counts.encode() if isinstance(counts, str) else counts)
    try:
        lengths = np.array(counts, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise UserError("a mask's counts are neither a list of lengths nor COCO's string of them") from None
    if lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != height * width:
        raise UserError(f"a mask's counts do not fill its {height} x {width} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(width, height).T.copy()  # runs go down the columns


def to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """[height, width] bool of an annotation's "segmentation", whichever of COCO's three kinds it is.

    Raises UserError as the other two do.
    """
    if isinstance(segmentation, Mapping):
        return rle_to_mask(segmentation, height, width)
    return polygons_to_mask(checked_polygons(segmentation), height, width)


def packed(segmentation: Any) -> Outline:
    """A "segmentation" for keeping: run lengths as they are, polygons as float64 arrays, which are a quarter of lists.

    Raises UserError for what is none, but does not look at run lengths.
    """
    return segmentation if isinstance(segmentation, Mapping) else checked_polygons(segmentation)


def checked_polygons(segmentation: Any) -> tuple[np.ndarray, ...]:
    """Each polygon as [x0, y0, x1, y1, ...] float64. Raises UserError for what is no list of polygons."""
    if not isinstance(segmentation, list | tuple):
        raise UserError(f"a segmentation is {type(segmentation).__name__}, neither polygons nor run lengths")
    return tuple(_corners(polygon).reshape(-1) for polygon in segmentation)


def _corners(polygon: Sequence[float] | np.ndarray) -> np.ndarray:
    """[n, 2] float64, x and y."""
    try:
        flat = np.array(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError("a polygon holds something that is no number") from None
    if flat.ndim != 1 or len(flat) % 2 or len(flat) < 6 or not np.isfinite(flat).all():
        raise UserError(f"a polygon has {flat.size} numbers; it needs x and y of three corners or more")
    return flat.reshape(-1, 2)


def _filled(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """[height, width] bool by the even-odd rule: a centre is inside after an odd number of edges to its left."""
    toggles = np.zeros((height, width + 1), dtype=np.int32)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        (x0, y0), (x1, y1) = sorted([(x0, y0), (x1, y1)], key=lambda corner: corner[1])
        # Rows whose centre r + 0.5 is in [y0, y1): half open, so that a corner counts for one of its two edges.
        rows = np.arange(max(0, int(np.ceil(y0 - 0.5))), min(height, int(np.ceil(y1 - 0.5))))
        if len(rows):
            crossing = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            columns = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
            np.add.at(toggles, (rows, columns), 1)
    return np.cumsum(toggles[:, :width], axis=1) % 2 == 1


def _lengths(packed: bytes) -> list[int]:
    """COCO's string of run lengths: five bits a letter from "0" on, low ones first.

    From the fourth run on a number is the difference to the run two before.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for letter in packed:
        bits = letter - ord("0")
        if not 0 <= bits < 64:
            raise UserError("a mask's counts hold a letter that COCO's run lengths do not have")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more letters follow
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise UserError("a mask's counts are cut short")
    return lengths
