"""Small trees of PASCAL VOC 2007's official layout, and its annotations read without an XML parser."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

from mvmr.data.voc import VOC_CLASSES

Objects = list[tuple[str, int]]
"""(class, difficult) of each object."""


def annotation(objects: Objects) -> str:
    parts = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"  # of VOC's layout task: no objects
    inside = "".join(f"<object><name>{n}</name><difficult>{d}</difficult>{parts}</object>" for n, d in objects)
    return f"<annotation><filename>x.jpg</filename><size><width>20</width></size>{inside}</annotation>"


def official_value(objects: Objects, of_class: str) -> int:
    """What the official CLASS_SPLIT.txt has: 1 present, -1 absent, 0 difficult objects only."""
    difficult = [flag for name, flag in objects if name == of_class]
    return -1 if not difficult else (1 if 0 in difficult else 0)


def write_voc(root: Path, trainval: dict[str, Objects], test: dict[str, Objects], *, lists: bool = False) -> Path:
    """ROOT/VOCdevkit/VOC2007 with images of different sizes, and with the official lists per class if asked for.

    The brightness of an image's left and right half and its red tell which classes it shows, roughly.
    """
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, images in (("trainval", trainval), ("test", test)):
        (base / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
        for name, objects in images.items():
            shown = [VOC_CLASSES.index(of_class) for of_class, _ in objects]
            pixels = generator.integers(0, 100, (16, 20 + int(name) % 10, 3))
            pixels[:, :10] += 80 * any(number % 3 == 0 for number in shown)
            pixels[:, 10:] += 80 * any(number % 3 == 1 for number in shown)
            pixels[..., 0] += 60 * any(number % 3 == 2 for number in shown)
            Image.fromarray(pixels.astype(np.uint8)).save(base / f"JPEGImages/{name}.jpg")
            (base / "Annotations" / f"{name}.xml").write_text(annotation(objects))
        for of_class in VOC_CLASSES if lists else ():
            lines = [f"{name} {official_value(objects, of_class):2d}\n" for name, objects in images.items()]
            (base / "ImageSets/Main" / f"{of_class}_{split}.txt").write_text("".join(lines))
    Image.new("RGB", (20, 20)).save(base / "JPEGImages/999999.jpg")  # of no split
    return base


def objects_by_search(image: str) -> Objects:
    """The objects of an image file's annotation, by text search."""
    text = Path(image.replace("JPEGImages", "Annotations").replace(".jpg", ".xml")).read_text()
    found = []
    for block in re.findall(r"<object>(.*?)</object>", text, re.DOTALL):
        own = re.sub(r"<part>.*?</part>", "", block, flags=re.DOTALL)
        found.append((re.findall(r"<name>(\w+)</name>", own)[0], int("<difficult>1<" in own)))
    return found
