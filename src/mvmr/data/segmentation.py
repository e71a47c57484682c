"""Images with a class for each pixel: PASCAL VOC's label images, and COCO's outlines painted into class maps."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvmr.data.coco import Instances, read_instances
from mvmr.data.coco_masks import to_mask
from mvmr.data.decode import UnreadableImage, decode
from mvmr.data.images import PathList, digest, files_fingerprint
from mvmr.data.layouts import Split
from mvmr.data.sources import DataConfig
from mvmr.data.voc import VOC_CLASSES
from mvmr.errors import RunError, UserError

IGNORED = 255
"""The label of pixels that are neither trained on nor measured."""
BACKGROUND = "background"
LAYOUTS = (
    "ROOT/VOCdevkit/VOC2012/ (or VOC2007/)\n  JPEGImages/*.jpg\n  SegmentationClass/*.png\n"
    "  ImageSets/Segmentation/train.txt  val.txt  (trainval.txt  test.txt)\n"
    "or ROOT/\n  annotations/instances_train*.json  instances_val*.json\n  train2017/*.jpg  val2017/*.jpg"
)


@dataclass(frozen=True)
class SegmentedImage:
    """One image and the class of each of its pixels."""

    image: Tensor
    """[3, H, W] uint8."""
    labels: Tensor
    """[H, W] int64: 0 is the background, 255 is ignored."""
    name: str


class SegmentationSource(ABC):
    """Images with label maps, by index."""

    def __init__(self, *, name: str, classes: tuple[str, ...], fingerprint: str):
        self.name = name
        """Data set and split."""
        self.classes = classes
        """Names by label, "background" first."""
        self.fingerprint = fingerprint
        """A hash of what the source holds."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> SegmentedImage:
        """Raises UserError for label maps that do not fit, RunError for images that cannot be read."""


class VOCSegmentation(SegmentationSource):
    """PASCAL VOC's layout: JPEGImages/NAME.jpg with MASKS/NAME.png, whose values are the labels, 255 the borders."""

    def __init__(self, base: Path, masks: str, names: list[str], *, name: str):
        self.images, self.masks, self.names = base / "JPEGImages", base / masks, names
        for folder, ending in ((self.images, ".jpg"), (self.masks, ".png")):
            there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
            missing = [each for each in names if each + ending not in there]
            if missing:
                raise UserError(
                    f"data.root: {folder / missing[0]}{ending} is missing, one of {len(missing)} of the {len(names)} "
                    f"that {name} lists; unpack the whole archive into {base}"
                )
        paths = [f"JPEGImages/{each}.jpg" for each in names] + [f"{masks}/{each}.png" for each in names]
        super().__init__(name=name, classes=(BACKGROUND, *VOC_CLASSES), fingerprint=_of_files(base, paths))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SegmentedImage:
        name = self.names[index]
        file = self.masks / f"{name}.png"
        try:
            with Image.open(file, formats=("PNG",)) as opened:
                values = np.array(opened)
                mode = opened.mode
        except (OSError, ValueError, SyntaxError) as error:
            raise RunError(f"{file}: cannot be read ({error}); take it from the archive again") from None
        if mode not in ("P", "L") or values.ndim != 2:
            raise UserError(f"{file}: has mode {mode}; a label image has one number a pixel (a palette or grey levels)")
        wrong = np.unique(values[(values >= len(self.classes)) & (values != IGNORED)])
        if len(wrong):
            raise UserError(
                f"{file}: has label {wrong[0]}; labels are 0 to {len(self.classes) - 1}, and 255 is ignored"
            )
        image = _image(self.images / f"{name}.jpg")
        return SegmentedImage(image, _fitting(values, image, file), name)


class COCOSegmentation(SegmentationSource):
    """COCO's annotations painted into one map: the smaller object over the larger.

    The pixels of crowds are ignored, but for those that an object covers, which have its class.
    """

    def __init__(self, folder: Path, found: Instances, *, name: str):
        self.folder, self.found = folder, found
        paths = [str(image["file_name"]) for image in found.images]
        missing = [path for path in paths if not (folder / path).is_file()]
        if missing:
            raise UserError(
                f"data.root: {folder / missing[0]} is missing, one of {len(missing)} of the {len(paths)} images of "
                f"{found.file}; unpack the images there"
            )
        fingerprint = digest(found.file.read_bytes(), _of_files(folder, paths).encode())
        super().__init__(name=name, classes=(BACKGROUND, *found.classes), fingerprint=fingerprint)

    def __len__(self) -> int:
        return len(self.found.images)

    def __getitem__(self, index: int) -> SegmentedImage:
        entry = self.found.images[index]
        file = self.folder / entry["file_name"]
        image = _image(file)
        height, width = image.shape[1:]
        values = np.zeros((int(entry.get("height", height)), int(entry.get("width", width))), dtype=np.uint8)
        labels = _fitting(values, image, file)
        painted = []
        for order, each in enumerate(self.found.annotations.get(entry["id"], ())):
            try:
                mask = to_mask(each.get("segmentation"), height, width)
            except UserError as error:
                raise UserError(f"{self.found.file}: annotation {each.get('id')}: {error}; correct the file") from None
            crowd = bool(each.get("iscrowd", 0))
            label = IGNORED if crowd else self.found.numbers[each["category_id"]] + 1
            # Crowds first, then from the largest object to the smallest; of equal ones the later on top.
            painted.append((not crowd, -int(mask.sum()), order, label, mask))
        for *_, label, mask in sorted(painted, key=lambda each: each[:3]):
            labels[torch.from_numpy(mask)] = label
        return SegmentedImage(image, labels, str(entry["file_name"]))


def open_segmentation(data: DataConfig, split: Split, *, annotations: Path | None = None) -> SegmentationSource:
    """Images and label maps of "train" or "test", from data.root or its parent, whichever of LAYOUTS lies there.

    VOC: train is train_aug.txt with SegmentationClassAug/ where both are there, else train.txt, and test is val.txt;
    where label images of test.txt are there (VOC2007), train is trainval.txt and test is test.txt. data.name=voc07 is
    the year 2007; of other names the newest that is there counts. COCO: train is annotations/instances_train2017.json
    (or the one instances_train*.json), test is instances_val2017.json likewise. annotations: another COCO JSON file for
    this split, as it stands or in annotations/. Raises UserError that names what is missing.
    """
    if split not in ("train", "test"):
        raise UserError(f"segmentation has a train and a test split, no {split}")
    if data.root is None:
        raise UserError(f"data.root is not set. {_expected()}")
    root = data.root.expanduser()
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder. {_expected()}")
    title = f"{data.name}/{split}"
    if annotations is not None:
        return _open_coco(root, _named(root, annotations), title)
    years = ("VOC2007",) if data.name == "voc07" else ("VOC2012", "VOC2007")
    for base in (*(root / "VOCdevkit" / year for year in years), *(root / year for year in years), root):
        if (base / "SegmentationClass").is_dir():
            return _open_voc(base, split, title)
    for base in (root, root / "coco"):
        if (base / "annotations").is_dir():
            kind = "train" if split == "train" else "val"
            usual = base / "annotations" / f"instances_{kind}2017.json"
            found = [usual] if usual.is_file() else sorted(usual.parent.glob(f"instances_{kind}*.json"))
            if len(found) == 1:
                return _open_coco(base, found[0], title)
            names = ", ".join(file.name for file in found[:4]) or "no such file"
            raise UserError(
                f"data.root: {usual.parent} should hold {usual.name} or one other instances_{kind}*.json, and holds "
                f"{names}; name the file of the {split} split (semantic.{split}_annotations=FILE)"
            )
    raise UserError(f"data.root: {root} holds no label maps. {_expected()}")


def _open_voc(base: Path, split: Split, title: str) -> VOCSegmentation:
    lists = base / "ImageSets" / "Segmentation"
    masks = "SegmentationClass"
    # VOC2012's test list has no public label images.
    tested = (lists / "test.txt").is_file() and all(
        (base / masks / f"{name}.png").is_file() for name in _names(lists / "test.txt")
    )
    if split == "test":
        chosen = "test" if tested else "val"
    elif tested:
        chosen = "trainval"
    else:
        augmented = (lists / "train_aug.txt").is_file() and (base / f"{masks}Aug").is_dir()
        chosen, masks = ("train_aug", f"{masks}Aug") if augmented else ("train", masks)
    return VOCSegmentation(base, masks, _names(lists / f"{chosen}.txt"), name=title)


def _names(file: Path) -> list[str]:
    try:
        lines = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"data.root: {file} is missing or cannot be read. {_expected()}") from None
    # Lists of the augmented set name files: /JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png
    names = [Path(line).stem if "/" in line else line for line in lines]
    if not names or len(set(names)) < len(names):
        raise UserError(f"data.root: {file} is empty or names an image twice; take it from the archive again")
    return names


def _open_coco(root: Path, file: Path, title: str) -> COCOSegmentation:
    found = read_instances(file)
    if len(found.classes) >= IGNORED:
        raise UserError(f"{file}: has {len(found.classes)} categories; label maps hold fewer than {IGNORED}")
    first = found.images[0]["file_name"]
    below = [place for place in (root, root / "images") if place.is_dir()]
    inside = [folder for place in below for folder in sorted(place.iterdir()) if folder.is_dir()]
    folder = next((folder for folder in (*below, *inside) if (folder / first).is_file()), None)
    if folder is None:
        raise UserError(
            f"data.root: {first}, the first image of {file}, is neither in {root} nor in a folder in it; unpack the "
            "images there"
        )
    return COCOSegmentation(folder, found, name=title)


def _named(root: Path, file: Path) -> Path:
    given = file.expanduser()
    for place in (given, root / given, root / "annotations" / given):
        if place.is_file():
            return place
    raise UserError(f"{file}: no such file, nor in {root / 'annotations'}; name a COCO instances JSON file")


def _image(file: Path) -> Tensor:
    try:
        return decode(file)
    except UnreadableImage as error:
        raise RunError(f"{error}; take the file from the archive again, or out of the list") from None


def _fitting(values: np.ndarray, image: Tensor, file: Path) -> Tensor:
    """[H, W] int64."""
    if values.shape != tuple(image.shape[1:]):
        raise UserError(
            f"{file}: the label map is {values.shape[0]} x {values.shape[1]} and the image {image.shape[1]} x "
            f"{image.shape[2]} (height x width); they must be alike"
        )
    return torch.from_numpy(values.astype(np.int64))


def _of_files(base: Path, paths: list[str]) -> str:
    stats = [os.stat(base / path) for path in paths]
    known = np.array([[each.st_size, each.st_mtime_ns] for each in stats], dtype=np.int64)
    return files_fingerprint(str(base), PathList.of(paths), known)


def _expected() -> str:
    drawing = "".join(f"\n  {line}" for line in LAYOUTS.splitlines())
    return f"Label maps need data.root=ROOT (or, for VOC, its parent) with{drawing}"
