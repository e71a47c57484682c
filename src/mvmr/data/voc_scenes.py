"""PASCAL VOC for detection: the boxes of VOC 2007 and VOC 2012, each alone, or both to train on."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from mvmr.data.images import FileSource
from mvmr.data.layouts import Wanted
from mvmr.data.scene_source import Objects, SceneSource
from mvmr.data.voc import VOC_CLASSES, VOC_LAYOUT, read_objects
from mvmr.types import UserError

VOC0712_LAYOUT = (
    "ROOT/VOCdevkit/\n  VOC2007/ and VOC2012/, each with\n    JPEGImages/*.jpg\n    Annotations/*.xml\n"
    "    ImageSets/Main/trainval.txt  (and test.txt in VOC2007)"
)
VOC12_LAYOUT = (
    "ROOT/VOCdevkit/VOC2012/\n  JPEGImages/*.jpg\n  Annotations/*.xml\n"
    "  ImageSets/Main/train.txt  val.txt  trainval.txt"
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")

__all__ = [
    "VOC0712_LAYOUT",
    "VOC12_LAYOUT",
    "VOC_LAYOUT",
    "listed_names",
    "read_boxes",
    "read_voc0712",
    "voc_scenes",
]


def voc_scenes(wanted: Wanted) -> SceneSource:
    """Scenes of voc07 or voc0712: train is trainval, test is the test split of 2007; difficult objects are `ignored`.

    Of voc12, whose test boxes are not public, train is train and test is val. Raises UserError where the folder
    or an annotation is not VOC's.
    """
    root, years = _devkit(wanted)
    found: list[Objects] = []
    for year, names in years.items():
        for name in names:
            file = root / year / "Annotations" / f"{name}.xml"
            try:
                objects = read_boxes(file)
            except FileNotFoundError:
                raise wanted.wrong(root / year, f"{file} is missing") from None
            found.append(Objects(f"{year}/JPEGImages/{name}.jpg", *objects))
            if wanted.progress:
                wanted.progress("reading annotations", len(found), sum(map(len, years.values())))
    return SceneSource(root, found, name=wanted.title, classes=VOC_CLASSES)


def read_boxes(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int] | None]:
    """Boxes [n, 4], labels [n], difficult [n], and (height, width) if given, of an annotation file.

    VOC counts pixels from 1 and includes the last: xmin 1 and xmax W become 0 and W. Raises UserError for what is no
    annotation and for boxes without area; FileNotFoundError.
    """
    listed = read_objects(file)  # refuses whatever is not safe or not VOC's
    tree = ElementTree.fromstring(file.read_bytes())
    boxes = [[_number(file, element, f"bndbox/{corner}") for corner in CORNERS] for element in tree.iterfind("object")]
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    array[:, :2] -= 1
    if (array[:, 2:] <= array[:, :2]).any():
        raise UserError(f"data.root: {file} has a box without area; take it from the archive again")
    size = None
    if tree.find("size") is not None:
        size = int(_number(file, tree, "size/height")), int(_number(file, tree, "size/width"))
    labels = np.array([number for number, _ in listed], dtype=np.int64)
    return array, labels, np.array([difficult for _, difficult in listed], dtype=bool), size


def read_voc0712(wanted: Wanted) -> FileSource:
    """The images of voc0712 or voc12 with labels [N, 20] int8, as `read_voc07` gives those of 2007."""
    root, years = _devkit(wanted)
    pairs = [(year, name) for year, names in years.items() for name in names]
    labels = torch.zeros(len(pairs), len(VOC_CLASSES), dtype=torch.int8)
    for row, (year, name) in enumerate(pairs if wanted.split != "pretrain" else []):
        file = root / year / "Annotations" / f"{name}.xml"
        try:
            objects = read_objects(file)
        except FileNotFoundError:
            raise wanted.wrong(root / year, f"{file} is missing") from None
        for number, difficult in objects:
            labels[row, number] = max(1 - 2 * int(difficult), int(labels[row, number]), key=(0, -1, 1).index)
    return FileSource(
        root, [f"{year}/JPEGImages/{name}.jpg" for year, name in pairs], None if wanted.split == "pretrain" else labels,
        name=wanted.title, classes=VOC_CLASSES,
    )  # fmt: skip


def _devkit(wanted: Wanted) -> tuple[Path, dict[str, list[str]]]:
    """The folder that holds the years, and the names of the images of each."""
    root = wanted.either("VOCdevkit")
    if root.name in ("VOC2007", "VOC2012"):
        root = root.parent
    if wanted.name == "voc12":
        split = {"pretrain": "trainval", "train": "train", "test": "val"}[wanted.split]
        return root, {"VOC2012": _names(wanted, root / "VOC2012", split)}
    if wanted.split == "test":
        return root, {"VOC2007": _names(wanted, root / "VOC2007", "test")}
    years = ("VOC2007", "VOC2012") if wanted.name == "voc0712" else ("VOC2007",)
    return root, {year: _names(wanted, root / year, "trainval") for year in years}


def listed_names(wanted: Wanted, file: Path) -> list[str]:
    """The first word of each line of a list of images. Raises UserError."""
    try:
        names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        there = next((folder for folder in file.parents if folder.is_dir()), file.parent)
        raise wanted.wrong(there, f"{file} is missing or cannot be read") from None
    if not names or len(set(names)) < len(names):
        raise wanted.wrong(file.parent, f"{file} is empty or names an image twice")
    return names


def _names(wanted: Wanted, folder: Path, split: str) -> list[str]:
    names, images = listed_names(wanted, folder / "ImageSets" / "Main" / f"{split}.txt"), folder / "JPEGImages"
    there = {entry.name for entry in os.scandir(images)} if images.is_dir() else set()
    missing = [name for name in names if f"{name}.jpg" not in there]
    if missing:
        raise wanted.wrong(folder, f"{images / missing[0]}.jpg is missing, one of {len(missing)} of {len(names)}")
    return names


def _number(file: Path, element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path) or ""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise UserError(f"data.root: {file} has {path.replace('/', '.')} {text!r}; a number of pixels belongs there")
    return value
