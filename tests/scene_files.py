"""Small trees of COCO's and VOC's layouts, whose objects are plain squares of a colour for each class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"bird": (230, 40, 40), "cat": (40, 220, 60)}
Square = tuple[str, int, int, int]
"""Class, left, top and side."""


def drawn(squares: list[Square], side: int, generator: np.random.Generator) -> Image.Image:
    pixels = generator.integers(70, 110, (side, side + 8, 3))
    for name, left, top, size in squares:
        pixels[top : top + size, left : left + size] = COLOURS[name]
    return Image.fromarray(pixels.astype(np.uint8))


def some_squares(generator: np.random.Generator, side: int) -> list[Square]:
    """One in the left half, and in two of three images one in the right half."""
    found = []
    for left in (0, side // 2)[: 1 + (generator.random() < 0.67)]:
        size = int(generator.integers(side // 4, side // 2 - 2))
        at = generator.integers(0, side // 2 - size, 2)
        name = str(generator.choice(list(COLOURS)))
        found.append((name, left + int(at[0]), int(at[1]) + side // 4, size))
    return found


def write_coco(root: Path, *, train: int = 6, val: int = 4, side: int = 64) -> Path:
    """ROOT in COCO's layout; category ids have gaps. Further annotations, a crowd among them, are the caller's."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            squares = some_squares(generator, side)
            drawn(squares, side, generator).save(root / split / f"{number:06d}.png")
            images.append({"id": number, "file_name": f"{number:06d}.png", "width": side + 8, "height": side})
            for name, left, top, size in squares:
                right, below = left + size, top + size
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": {"cat": 17, "bird": 16}[name],
                    "bbox": [left, top, size, size], "area": size**2, "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, below, left, below]],
                })  # fmt: skip
        categories = [{"id": 17, "name": "cat"}, {"id": 16, "name": "bird"}]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def voc_annotation(objects: list[tuple[str, int, tuple[int, int, int, int]]], width: int, height: int) -> str:
    """objects: class, difficult, and VOC's own xmin, ymin, xmax, ymax."""
    inside = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox><part><name>head</name><bndbox><xmin>9</xmin></bndbox></part></object>"
        for name, difficult, box in objects
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{inside}</annotation>"


def write_voc_squares(
    root: Path, *, train: int = 6, test: int = 4, side: int = 64, year: str = "VOC2007", seed: int = 0
) -> Path:
    """ROOT/VOCdevkit/VOC2007; the last test image's first object is difficult."""
    base = root / "VOCdevkit" / year
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for split, count, first in (("trainval", train, 0), ("test", test, train)):
        names = [f"{first + number:06d}" for number in range(count)]
        (base / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            squares = some_squares(generator, side)
            drawn(squares, side, generator).save(base / "JPEGImages" / f"{name}.jpg", quality=95)
            objects = [
                (
                    of_class,
                    int(split == "test" and name == names[-1] and number == 0),
                    (x + 1, y + 1, x + size, y + size),
                )
                for number, (of_class, x, y, size) in enumerate(squares)
            ]
            (base / "Annotations" / f"{name}.xml").write_text(voc_annotation(objects, side + 8, side))
    return root
