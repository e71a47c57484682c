"""Images with a class for each pixel: PASCAL VOC's label images, and COCO's outlines painted into class maps."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvmr.data.coco import Instances, open_instances, segmentation_of
from mvmr.data.coco_masks import to_mask
from mvmr.data.decode import UnreadableImage, decode
from mvmr.data.images import digest
from mvmr.data.layouts import Split, Wanted
from mvmr.data.sources import DataConfig
from mvmr.data.voc import VOC_CLASSES
from mvmr.data.voc_scenes import listed_names
from mvmr.errors import RunError, UserError

IGNORED = 255
"""The label of pixels that are neither trained on nor measured."""
BACKGROUND = "background"
LAYOUTS = (
    "ROOT/VOCdevkit/VOC2012/ (or VOC2007/)\n  JPEGImages/*.jpg\n  SegmentationClass/*.png\n"
    "  ImageSets/Segmentation/train.txt  val.txt  (trainval.txt  test.txt)\n"
    "or ROOT/\n  annotations/instances_train*.json  instances_val*.json\n  train2017/*.jpg  val2017/*.jpg"
)

YEARS = {"voc07": ("VOC2007",), "voc12": ("VOC2012",)}
"""Data sets that are one year of VOC."""


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

    def __init__(self, *, name: str, classes: tuple[str, ...]):
        self.name = name
        """Data set and split."""
        self.classes = classes
        """Names by label, "background" first."""
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the labels, and of the names and sizes of the images; the same wherever they lie."""
        self._fingerprint = self._fingerprint or digest(repr((self.name, self.classes)).encode(), *self._hashed())
        return self._fingerprint

    @abstractmethod
    def _hashed(self) -> Iterator[bytes]: ...

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
        super().__init__(name=name, classes=(BACKGROUND, *VOC_CLASSES))

    def _hashed(self) -> Iterator[bytes]:
        yield _sizes(self.images, [f"{each}.jpg" for each in self.names])
        for each in self.names:
            yield digest((self.masks / f"{each}.png").read_bytes()).encode()

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
        super().__init__(name=name, classes=(BACKGROUND, *found.classes))

    def _hashed(self) -> Iterator[bytes]:
        yield self.found.digest.encode()
        yield _sizes(self.folder, [image["file_name"] for image in self.found.images])

    def __len__(self) -> int:
        return len(self.found.images)

    def __getitem__(self, index: int) -> SegmentedImage:
        entry = self.found.images[index]
        file = self.folder / entry["file_name"]
        image = _image(file)
        height, width = image.shape[1:]
        values = np.zeros((entry.get("height", height), entry.get("width", width)), dtype=np.uint8)
        labels = _fitting(values, image, file)
        painted = []
        for order, each in enumerate(self.found.annotations.get(entry["id"], ())):
            outline = segmentation_of(self.found, each)
            try:
                mask = to_mask(outline, height, width)
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
    where label images of test.txt are there (VOC2007), train is trainval.txt and test is test.txt. data.name=voc07 and
    voc12 are those years, coco is COCO; of other names the newest year that is there counts, then COCO. COCO: as
    `open_instances` finds it, with `annotations` another JSON file for this split. Raises UserError that names what is
    missing.
    """
    if split not in ("train", "test"):
        raise UserError(f"segmentation has a train and a test split, no {split}")
    years = YEARS.get(data.name, ("VOC2012", "VOC2007"))
    layout = LAYOUTS.replace("VOC2012/ (or VOC2007/)", f"{years[0]}/") if data.name in YEARS else LAYOUTS
    wanted = Wanted(data.name, split, data.root, layout)
    root = wanted.folder()
    if annotations is not None or data.name == "coco":
        return _open_coco(wanted, annotations)
    # A folder of one year may be given itself, but not for another year.
    bases = [*(root / "VOCdevkit" / year for year in years), *(root / year for year in years)]
    if root.name not in ("VOC2007", "VOC2012") or root.name in years:
        bases.append(root)
    for base in bases:
        if (base / "SegmentationClass").is_dir():
            return _open_voc(wanted, base)
    if data.name not in YEARS and (wanted.either("coco", "COCO") / "annotations").is_dir():
        return _open_coco(wanted, None)
    raise wanted.wrong(root, f"{root} holds no label maps" + (f" of {years[0]}" if data.name in YEARS else ""))


def _open_voc(wanted: Wanted, base: Path) -> VOCSegmentation:
    lists, masks = base / "ImageSets" / "Segmentation", "SegmentationClass"
    # VOC2012's test list has no public label images.
    tested = (lists / "test.txt").is_file() and all(
        (base / masks / f"{name}.png").is_file() for name in _names(wanted, lists / "test.txt")
    )
    if wanted.split == "test":
        chosen = "test" if tested else "val"
    elif tested:
        chosen = "trainval"
    else:
        listed, drawn = lists / "train_aug.txt", base / f"{masks}Aug"
        chosen = "train"
        if listed.is_file() and drawn.is_dir():
            chosen, masks = "train_aug", drawn.name
        elif listed.is_file() or drawn.is_dir():
            missing = drawn if listed.is_file() else listed
            warnings.warn(
                f"semantic: {missing} is missing, so the augmented set is left out and {lists / 'train.txt'} is "
                "trained on; put both there for the protocol of 10,582 images",
                stacklevel=3,
            )
    return VOCSegmentation(base, masks, _names(wanted, lists / f"{chosen}.txt"), name=wanted.title)


def _names(wanted: Wanted, file: Path) -> list[str]:
    # Lists of the augmented set name files: /JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png
    return [Path(name).stem if "/" in name else name for name in listed_names(wanted, file)]


def _open_coco(wanted: Wanted, annotations: Path | None) -> COCOSegmentation:
    found, _, folder = open_instances(wanted, annotations)
    if len(found.classes) >= IGNORED:
        raise UserError(f"{found.file}: has {len(found.classes)} categories; label maps hold fewer than {IGNORED}")
    return COCOSegmentation(folder, found, name=wanted.title)


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


def _sizes(folder: Path, names: list[str]) -> bytes:
    return "\n".join(f"{name} {os.path.getsize(folder / name)}" for name in names).encode()
