"""The data sets: where their images lie, and how each split of them is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvmr.data.coco import COCO_LAYOUT, read_coco
from mvmr.data.images import ArraySource, ImageSource
from mvmr.data.layouts import (
    Wanted,
    held_out,
    read_folder,
    read_imagenet,
    read_images,
    read_split_folders,
    read_tiny_imagenet,
)
from mvmr.data.voc import VOC_LAYOUT, read_voc07
from mvmr.data.voc_scenes import VOC0712_LAYOUT, VOC12_LAYOUT, read_voc0712
from mvmr.errors import RunError
from mvmr.types import IMAGENET_MEAN, IMAGENET_STD

Channels = tuple[float, float, float]
IMAGENET: tuple[Channels, Channels] = IMAGENET_MEAN, IMAGENET_STD
CIFAR: tuple[Channels, Channels] = (0.491, 0.482, 0.447), (0.247, 0.243, 0.261)
DIGITS: tuple[Channels, Channels] = (0.305, 0.305, 0.305), (0.376, 0.376, 0.376)

DIGITS_HELD_OUT = 500
STL10_SIDE = 96

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""The 20 superclasses of CIFAR-100 (Krizhevsky 2009, Section 3), in the order of their official numbers."""


@dataclass(frozen=True)
class DataSet:
    """One entry of DATASETS."""

    description: str
    read: Callable[[Wanted], ImageSource]
    """Reads a split: pretrain (never labels), train or test."""
    normalisation: tuple[Channels, Channels] = IMAGENET
    size: int | None = None
    """Side of its images where all are square and of one size."""
    layout: str = ""
    """A drawing of the folders expected under data.root."""
    labelled: bool = True
    fetchable: bool = False

    @property
    def mean(self) -> Channels:
        return self.normalisation[0]

    @property
    def std(self) -> Channels:
        return self.normalisation[1]


def read_digits(wanted: Wanted) -> ArraySource:
    """scikit-learn's scans of handwritten digits: 8 x 8, 0 ... 16; 1,297 to train on and 500 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # [N, 8, 8]
    mask = held_out(labels, DIGITS_HELD_OUT)
    own = mask if wanted.split == "test" else ~mask
    images = grey[own].unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    return ArraySource(images, labels[own], name=wanted.title, classes=tuple(str(digit) for digit in range(10)))


def read_cifar(wanted: Wanted, *, classes: int) -> ImageSource:
    """The official Python files, opened only if their MD5 is the published one; else class folders of files."""
    official = "cifar-10-batches-py" if wanted.name == "cifar10" else "cifar-100-python"
    root = wanted.folder()
    holder = root.parent if root.name == official else root
    as_files = any((root / below / "train").is_dir() for below in ("", wanted.name))
    if not (holder / official).is_dir() and (as_files or not wanted.download):
        return read_split_folders(wanted, wanted.name, classes=classes)
    data = _official_cifar(wanted, holder, official)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32]
    labels, names = torch.tensor(data.targets), tuple(data.classes)
    if wanted.name == "cifar20":
        labels, names = _coarse(labels, names), tuple(SUPERCLASSES)
    return ArraySource(images, labels, name=wanted.title, classes=names)


def _official_cifar(wanted: Wanted, holder: Path, official: str) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if wanted.name == "cifar10" else CIFAR100
    try:
        return kind(str(holder), train=wanted.split != "test", download=wanted.download)
    except (OSError, RuntimeError) as error:
        if wanted.download:
            raise _not_fetched(wanted, error) from None
        folder = holder / official
        raise wanted.wrong(folder, f"{folder} is incomplete, or a file's MD5 is not the official one") from None


def _coarse(labels: Tensor, names: tuple[str, ...]) -> Tensor:
    number = {fine: i for i, members in enumerate(SUPERCLASSES.values()) for fine in members.split()}
    return torch.tensor([number[name] for name in names])[labels]


def read_stl10(wanted: Wanted) -> ArraySource:
    """The official binary files; pretrain is train + unlabeled (105,000 images, no labels)."""
    folder = wanted.either("stl10_binary")
    if wanted.download and not (folder / "train_X.bin").is_file():
        from torchvision.datasets import STL10

        try:
            STL10(str(folder), split="train", download=True)
        except (OSError, RuntimeError) as error:
            raise _not_fetched(wanted, error) from None
        folder = wanted.either("stl10_binary")
    parts = {"pretrain": ["train", "unlabeled"], "train": ["train"], "test": ["test"]}[wanted.split]
    if any(not (folder / f"{part}_X.bin").is_file() for part in parts):
        raise wanted.wrong(folder)
    stored = [_stl10_images(wanted, folder / f"{part}_X.bin") for part in parts]
    images = torch.empty(sum(map(len, stored)), 3, STL10_SIDE, STL10_SIDE, dtype=torch.uint8)
    filled = 0
    for part in stored:
        for start in range(0, len(part), 1000):  # in pieces: the whole is 2.9 GB
            piece = torch.from_numpy(np.array(part[start : start + 1000]))
            images[filled : filled + len(piece)] = piece.transpose(2, 3)  # the files are column-major
            filled += len(piece)
    if wanted.split == "pretrain":
        return ArraySource(images, None, name=wanted.title)
    return ArraySource(images, _stl10_labels(wanted, folder, len(images)), name=wanted.title, classes=STL10_CLASSES)


STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def _stl10_images(wanted: Wanted, file: Path) -> np.ndarray:
    size = file.stat().st_size
    if size == 0 or size % (3 * STL10_SIDE**2):
        raise wanted.wrong(file.parent, f"{file} is cut short: {size} bytes are no whole number of images")
    return np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, 3, STL10_SIDE, STL10_SIDE)


def _stl10_labels(wanted: Wanted, folder: Path, count: int) -> Tensor:
    file = folder / ("test_y.bin" if wanted.split == "test" else "train_y.bin")
    labels = torch.from_numpy(np.fromfile(file, dtype=np.uint8).astype(np.int64)) - 1 if file.is_file() else None
    if labels is None or len(labels) != count or not ((labels >= 0) & (labels < 10)).all():
        raise wanted.wrong(folder, f"{file} does not hold {count} labels from 1 to 10")
    return labels


def _not_fetched(wanted: Wanted, error: Exception) -> RunError:
    return RunError(f"data.download: {wanted.name} could not be fetched ({error}); put it under data.root by hand")


STL10_LAYOUT = "ROOT/stl10_binary/\n  train_X.bin  train_y.bin  unlabeled_X.bin\n  test_X.bin  test_y.bin"
IMAGENET_LAYOUT = "ROOT/\n  train/n01440764/*.JPEG  (one folder a class)\n  val/n01440764/*.JPEG"
FOLDER_LAYOUT = "ROOT/\n  train/CLASS/*  and  test/CLASS/* (or val/)\nor ROOT/\n  CLASS/*"
TINY_LAYOUT = "ROOT/\n  train/n01443537/images/*.JPEG\n  val/images/*.JPEG\n  val/val_annotations.txt"


def _cifar_layout(official: str, files: str, name: str) -> str:
    return f"ROOT/{official}/\n  {files}\nor ROOT/{name}/\n  train/CLASS/*.png\n  test/CLASS/*.png"


def _imagenet_part(classes: int) -> DataSet:
    return DataSet(f"ImageNet's {classes} classes on data.class_list", read_imagenet, layout=IMAGENET_LAYOUT)


DATASETS: dict[str, DataSet] = {
    "digits": DataSet("1,797 scanned digits that come with scikit-learn; no files needed", read_digits, DIGITS, 8),
    "cifar10": DataSet(
        "60,000 photographs of 10 classes, 32 px", partial(read_cifar, classes=10), CIFAR, 32,
        _cifar_layout("cifar-10-batches-py", "data_batch_1 ... data_batch_5  test_batch  batches.meta", "cifar10"),
        fetchable=True,
    ),
    "cifar100": DataSet(
        "60,000 photographs of 100 classes, 32 px", partial(read_cifar, classes=100), CIFAR, 32,
        _cifar_layout("cifar-100-python", "train  test  meta", "cifar100"), fetchable=True,
    ),
    "cifar20": DataSet(
        "CIFAR-100 with its 20 superclasses", partial(read_cifar, classes=20), CIFAR, 32,
        _cifar_layout("cifar-100-python", "train  test  meta", "cifar20"), fetchable=True,
    ),
    "stl10": DataSet(
        "105,000 photographs to pretrain on, 13,000 labelled, 96 px", read_stl10, IMAGENET, STL10_SIDE,
        STL10_LAYOUT, fetchable=True,
    ),
    "imagenet": DataSet("ImageNet-1k from train/ and val/ class folders", read_imagenet, layout=IMAGENET_LAYOUT),
    "imagenet50": _imagenet_part(50),
    "imagenet100": _imagenet_part(100),
    "imagenet200": _imagenet_part(200),
    "tiny-imagenet": DataSet(
        "110,000 labelled photographs of 200 classes, 64 px", read_tiny_imagenet, size=64, layout=TINY_LAYOUT
    ),
    "voc07": DataSet(
        "PASCAL VOC 2007: 9,963 multi-label photographs of 20 classes", read_voc07, layout=VOC_LAYOUT
    ),
    "voc12": DataSet(
        "PASCAL VOC 2012: train and val, 20 classes, boxes and label maps", read_voc0712, layout=VOC12_LAYOUT
    ),
    "voc0712": DataSet(
        "PASCAL VOC 2007 and 2012 trainval to train on, 2007 test: 20 classes, boxes", read_voc0712,
        layout=VOC0712_LAYOUT,
    ),
    "coco": DataSet("COCO 2017: 123,287 photographs of 80 classes, boxes and masks", read_coco, layout=COCO_LAYOUT),
    "folder": DataSet("your own images in class folders", read_folder, layout=FOLDER_LAYOUT),
    "images": DataSet(
        "your own images, any tree of files, no labels", read_images, layout="ROOT/\n  **/*.jpg, *.png, ...",
        labelled=False,
    ),
}  # fmt: skip
