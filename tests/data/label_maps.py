"""Small trees of VOC's and COCO's layouts with label maps that a reader can compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {0: (40, 40, 40), 1: (220, 60, 60), 2: (60, 220, 60), 3: (60, 60, 220)}
"""Of the background and three classes."""


def scene(number: int, *, height: int = 56, width: int = 64) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Image [H, W, 3] and labels [H, W] of two squares on a grey ground, and the squares as COCO's polygons."""
    generator = np.random.default_rng(number)
    labels = np.zeros((height, width), dtype=np.uint8)
    objects = []
    for side in (24, 14):  # the smaller one lies on top
        top, left = int(generator.integers(0, height - side)), int(generator.integers(0, width - side))
        category = int(generator.integers(1, 4))
        labels[top : top + side, left : left + side] = category
        corners = [left, top, left + side, top, left + side, top + side, left, top + side]
        objects.append({"category_id": 10 * category, "segmentation": [corners], "bbox": [left, top, side, side],
                        "area": side * side, "iscrowd": 0})  # fmt: skip
    image = np.array([COLOURS[value] for value in range(4)], dtype=np.int64)[labels]
    image += generator.integers(-20, 20, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels, objects


def write_voc_masks(root: Path, splits: dict[str, list[int]], *, year: int = 2012, masks: str = "") -> Path:
    """ROOT/VOCdevkit/VOCyear with scenes by number, a list a split, and a border of 255 around each image."""
    base = root / "VOCdevkit" / f"VOC{year}"
    folder = base / (masks or "SegmentationClass")
    for each in (base / "JPEGImages", folder, base / "ImageSets" / "Segmentation"):
        each.mkdir(parents=True, exist_ok=True)
    for split, numbers in splits.items():
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{n:06d}\n" for n in numbers))
        for number in numbers:
            image, labels, _ = scene(number)
            labels[0] = 255
            Image.fromarray(image).save(base / "JPEGImages" / f"{number:06d}.jpg", quality=95)
            drawn = Image.fromarray(labels)
            if not masks:  # VOC's own have a palette, the augmented ones grey levels
                drawn.putpalette([value for value in range(256) for _ in range(3)])
            drawn.save(folder / f"{number:06d}.png")
    return base


def write_coco(
    root: Path, splits: dict[str, list[int]], *, extra: dict[int, list[dict[str, Any]]] | None = None
) -> Path:
    """ROOT/SPLIT/*.png and ROOT/annotations/instances_SPLIT.json; `extra` adds annotations to scenes by number."""
    (root / "annotations").mkdir(parents=True)
    for split, numbers in splits.items():
        (root / split).mkdir()
        images, annotations = [], []
        for number in numbers:
            image, _, objects = scene(number)
            Image.fromarray(image).save(root / split / f"{number}.png")
            height, width = image.shape[:2]
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            for each in [*objects, *(extra or {}).get(number, [])]:
                annotations.append({"id": len(annotations) + 1, "image_id": number, "bbox": [0, 0, 1, 1], **each})
        categories = [{"id": 10 * n, "name": name} for n, name in ((3, "blue"), (1, "red"), (2, "green"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
