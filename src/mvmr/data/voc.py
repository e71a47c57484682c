"""PASCAL VOC 2007 for multi-label classification: which of 20 classes an image shows, from its annotation."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from mvmr.data.images import FileSource
from mvmr.data.layouts import Wanted
from mvmr.errors import UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_LAYOUT = (
    "ROOT/VOCdevkit/VOC2007/\n  JPEGImages/*.jpg\n  Annotations/*.xml\n"
    "  ImageSets/Main/trainval.txt  test.txt  (CLASS_trainval.txt and so on are checked if there)"
)


def read_voc07(wanted: Wanted) -> FileSource:
    """VOC2007: pretrain (without labels) and train are trainval, test is test; labels [N, 20] int8 from the XML.

    1: the image shows an object of the class; 0: it does not; -1: only objects marked as difficult, to be left out.
    Where the official CLASS_SPLIT.txt lists are there, a warning says if they differ; the annotations decide.
    """
    root = wanted.either("VOCdevkit/VOC2007", "VOC2007")
    images, listed = root / "JPEGImages", root / "ImageSets" / "Main"
    split = "test" if wanted.split == "test" else "trainval"
    if not images.is_dir() or not listed.is_dir():
        raise wanted.wrong(root)
    names = _names(wanted, listed / f"{split}.txt")
    there = {entry.name for entry in os.scandir(images)}
    missing = [name for name in names if f"{name}.jpg" not in there]
    if missing:
        raise wanted.wrong(
            root, f"{images / missing[0]}.jpg is missing, one of {len(missing)} of the {len(names)} in {split}.txt"
        )
    labels = None
    if wanted.split != "pretrain":
        labels = _labels(wanted, root, names)
        _compare(labels, names, listed, split)
    paths = [f"{name}.jpg" for name in names]
    return FileSource(images, paths, labels, name=wanted.title, classes=VOC_CLASSES)


def _names(wanted: Wanted, file: Path) -> list[str]:
    try:
        names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise wanted.wrong(file.parent, f"{file} is missing or cannot be read") from None
    if not names or len(set(names)) < len(names):
        raise wanted.wrong(file.parent, f"{file} is empty or names an image twice")
    return names


def _labels(wanted: Wanted, root: Path, names: list[str]) -> Tensor:
    labels = torch.zeros(len(names), len(VOC_CLASSES), dtype=torch.int8)
    for row, name in enumerate(names):
        file = root / "Annotations" / f"{name}.xml"
        try:
            objects = read_objects(file)
        except FileNotFoundError:
            raise wanted.wrong(root, f"{file} is missing") from None
        for number, is_difficult in objects:
            if not is_difficult:
                labels[row, number] = 1
            elif labels[row, number] == 0:
                labels[row, number] = -1
        if wanted.progress:
            wanted.progress("reading annotations", row + 1, len(names))
    return labels


class _Doctype(Exception):
    pass


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        # Entities can only be declared in a document type, so none is ever expanded.
        raise _Doctype


def read_objects(file: Path) -> list[tuple[int, bool]]:
    """(class number, difficult) of every object in an annotation file.

    Raises UserError for what is no annotation, unknown classes, and files with a document type; FileNotFoundError.
    """
    try:
        tree = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=_Builder()))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"data.root: {file} cannot be read ({error.strerror})") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"data.root: {file} is no XML ({error}); take it from the archive again") from None
    except _Doctype:
        raise UserError(
            f"data.root: {file} declares a document type, which no VOC annotation does; replace it"
        ) from None
    objects = []
    for element in tree.iterfind("object"):
        name, difficult = (element.findtext("name") or "").strip(), (element.findtext("difficult") or "0").strip()
        if name not in VOC_CLASSES or difficult not in ("0", "1"):
            raise UserError(
                f"data.root: {file} has an object {name!r} with difficult={difficult!r}; voc07 has the classes "
                f"{', '.join(VOC_CLASSES)}, and difficult is 0 or 1"
            )
        objects.append((VOC_CLASSES.index(name), difficult == "1"))
    return objects


def _compare(labels: Tensor, names: list[str], listed: Path, split: str) -> None:
    """Warn where the official lists (1 present, -1 absent, 0 difficult only) say something else."""
    ours = {1: "1", 0: "-1", -1: "0"}
    for number, of_class in enumerate(VOC_CLASSES):
        file = listed / f"{of_class}_{split}.txt"
        if not file.is_file():
            continue
        rows = [line.split() for line in file.read_text(errors="replace").splitlines()]
        theirs = {row[0]: row[1] for row in rows if len(row) == 2}
        values = labels[:, number].tolist()
        other = [name for name, value in zip(names, values, strict=True) if theirs.get(name) != ours[value]]
        if other:
            warnings.warn(
                f"{file} differs from the annotations for {len(other)} of {len(names)} images, {other[0]} among them; "
                "the annotations decide",
                stacklevel=2,
            )
