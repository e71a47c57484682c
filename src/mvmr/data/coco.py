"""COCO's annotations (Lin et al., ECCV 2014): instances_*.json to scenes with boxes and masks, and to labels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvmr.data.coco_masks import Outline, checked_polygons, packed, rle_to_mask
from mvmr.data.images import FileSource, digest
from mvmr.data.layouts import Wanted
from mvmr.data.scene_source import Objects, SceneSource
from mvmr.types import UserError

COCO_LAYOUT = (
    "ROOT/\n  train2017/*.jpg\n  val2017/*.jpg\n  annotations/instances_train2017.json\n"
    "  annotations/instances_val2017.json"
)
FOLDERS = ("train2017", "val2017")


@dataclass(frozen=True)
class Instances:
    """A file of COCO's instances, checked."""

    file: Path
    images: list[dict[str, Any]]
    """By id."""
    annotations: dict[int, list[dict[str, Any]]]
    """By image id."""
    numbers: dict[int, int]
    """{category id: class number}, contiguous, in the order of the ids."""
    classes: tuple[str, ...]
    digest: str
    """Of the file's bytes as they were read."""


def coco_scenes(wanted: Wanted, *, masks: bool = False, annotations: Path | None = None) -> SceneSource:
    """Scenes of COCO 2017: train from train2017, test from val2017; crowds are `ignored`, images without objects kept.

    annotations: another file of instances, found as `open_instances` says. Raises UserError.
    """
    found, root, folder = open_instances(wanted, annotations)
    place = folder.relative_to(root).as_posix()
    objects = [_objects(found, image, "" if place == "." else f"{place}/", masks) for image in found.images]
    return SceneSource(root, objects, name=wanted.title, classes=found.classes, draw=draw_outline if masks else None)


def read_coco(wanted: Wanted) -> FileSource:
    """The images of COCO 2017 with labels [N, C] int8: 1 for a class that is shown, -1 where only as a crowd."""
    found, root, folder = open_instances(wanted, None)
    labels = torch.zeros(len(found.images), len(found.classes), dtype=torch.int8)
    for row, image in enumerate(found.images):
        for annotation in sorted(found.annotations.get(image["id"], ()), key=lambda a: -a.get("iscrowd", 0)):
            labels[row, found.numbers[annotation["category_id"]]] = -1 if annotation.get("iscrowd", 0) else 1
    return FileSource(
        root, [(folder / image["file_name"]).relative_to(root).as_posix() for image in found.images],
        None if wanted.split == "pretrain" else labels, name=wanted.title, classes=found.classes,
    )  # fmt: skip


def open_instances(wanted: Wanted, annotations: Path | None) -> tuple[Instances, Path, Path]:
    """The instances of a split, data.root or the folder coco/ in it, and the folder in there that holds the images.

    annotations: another file than the split's own, as it is, or in the root or its annotations/; its images may lie in
    any folder of the root or of its images/. Without one it is instances_train2017.json or instances_val2017.json, or
    the one other instances_train*.json or instances_val*.json. Raises UserError that names what is missing.
    """
    root = wanted.either("coco", "COCO")
    kind = "val" if wanted.split == "test" else "train"
    own = root / f"{kind}2017"
    if annotations is None:
        found = read_instances(_own_file(wanted, root, kind))
    else:
        given = annotations.expanduser()
        places = (given, root / given, root / "annotations" / given)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise UserError(
                f"{annotations} does not exist, nor does it in {root / 'annotations'}; give a file of COCO's "
                "instances, such as `mvmr splits` makes"
            )
        found = read_instances(file)
    folders = [own] if annotations is None and own.is_dir() else _folders(root, own)
    return found, root, _with_images(wanted, root, found, folders)


def _own_file(wanted: Wanted, root: Path, kind: str) -> Path:
    usual = root / "annotations" / f"instances_{kind}2017.json"
    found = [usual] if usual.is_file() else sorted(usual.parent.glob(f"instances_{kind}*.json"))
    if len(found) != 1:
        others = ", ".join(file.name for file in found[:4]) or f"no other instances_{kind}*.json"
        split = "test" if wanted.split == "test" else "train"
        raise wanted.wrong(
            usual.parent if usual.parent.is_dir() else root,
            f"{usual} is missing, and beside it lies {others}; name one as EVALUATION.{split}_annotations=FILE, or "
            "unpack the archive",
        )
    return found[0]


def _folders(root: Path, own: Path) -> list[Path]:
    """Where images may lie, the likeliest first."""
    holders = [place for place in (root, root / "images") if place.is_dir()]
    inside = [each for place in holders for each in sorted(place.iterdir()) if each.is_dir()]
    usual = [own, *(root / name for name in FOLDERS)]
    return list(dict.fromkeys([*(each for each in usual if each.is_dir()), *holders, *inside]))


def _with_images(wanted: Wanted, root: Path, found: Instances, folders: list[Path]) -> Path:
    """The first folder that holds all images; else the error names one that is missing where most are."""
    names = [image["file_name"] for image in found.images]
    fewest, nearest = len(names) + 1, ""
    for folder in folders:
        there = {entry.name for entry in os.scandir(folder)}
        missing = [name for name in names if name not in there and not ("/" in name and (folder / name).is_file())]
        if not missing:
            return folder
        if len(missing) < fewest:
            fewest = len(missing)
            nearest = f"{folder / missing[0]} is missing, one of {fewest} of the {len(names)} images of {found.file}"
    raise wanted.wrong(root, nearest or f"{root} holds no folder of images")


def read_instances(file: Path) -> Instances:
    """A JSON of COCO's instances. Raises UserError that names the file, for what is none."""
    try:
        raw = file.expanduser().read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); take it from the archive again") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{file} has no images and annotations; give a file of instances, not captions or keypoints")
    try:
        names = {_whole(category, "id"): str(category["name"]) for category in content["categories"]}
        images = sorted(map(_image, content["images"]), key=lambda image: image["id"])
        ids = {image["id"] for image in images}
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            _check_annotation(annotation)
            if annotation["category_id"] not in names or annotation["image_id"] not in ids:
                raise ValueError(f"annotation {annotation.get('id')} is of an image or category that is not there")
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no file of COCO's instances: {type(error).__name__} {error}") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}; correct the file") from None
    if not images or not names or len(ids) < len(images):
        raise UserError(f"{file} has no images, no categories, or an image id twice")
    numbers = {identity: number for number, identity in enumerate(sorted(names))}
    return Instances(file, images, by_image, numbers, tuple(names[identity] for identity in numbers), digest(raw))


def _whole(entry: Mapping[str, Any], key: str) -> int:
    # Text is refused, not read as a number: image "1" and the annotations of image 1 would never meet.
    value = entry[key]
    if type(value) is not int:
        raise ValueError(f"{key} {value!r} is no whole number")
    return value


def _image(image: dict[str, Any]) -> dict[str, Any]:
    identity = _whole(image, "id")
    name = image["file_name"]
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(
            f"image {identity} has file_name {name!r}; the name of a file in the images' folder belongs there"
        )
    for key in ("height", "width"):
        if key in image and (type(image[key]) is not int or image[key] < 1):
            raise ValueError(f"image {identity} has {key} {image[key]!r}, which is no number of pixels")
    return image


def _check_annotation(annotation: dict[str, Any]) -> None:
    for key in ("category_id", "image_id"):
        _whole(annotation, key)
    box, crowd = annotation["bbox"], annotation.get("iscrowd", 0)
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not numbers or not np.isfinite(box).all() or min(box[2:]) < 0:
        raise ValueError(f"annotation {annotation.get('id')} has a bbox that is none ({box!r})")
    if crowd not in (0, 1):
        raise ValueError(f"annotation {annotation.get('id')} has iscrowd {crowd!r}; it is 0 or 1")


def segmentation_of(found: Instances, annotation: Mapping[str, Any]) -> Outline:
    """What an annotation's mask is drawn from. Raises UserError where that is none, or empty for what is no crowd."""
    given = annotation.get("segmentation")
    try:
        if not given and not annotation.get("iscrowd", 0):
            raise UserError("it has no segmentation")
        return packed([] if given is None else given)
    except UserError as error:
        raise UserError(
            f"{found.file}: annotation {annotation.get('id')}: {error}; correct the file, or leave the annotation out"
        ) from None


def draw_outline(outline: Outline, height: int, width: int) -> np.ndarray:
    """[height, width] bool of polygons or run lengths, polygons as COCO's own tool draws them.

    Raises UserError where the package that has this tool is missing, and for what is no segmentation.
    """
    if isinstance(outline, Mapping):
        return rle_to_mask(outline, height, width)  # exact
    polygons = [polygon.tolist() for polygon in checked_polygons(outline)]
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise UserError("masks are drawn by faster-coco-eval: pip install 'mvmr[detection]'") from None
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    lengths = mask.merge(mask.frPyObjects(polygons, height, width))
    return np.asarray(mask.decode(lengths)).reshape(height, width).astype(bool)


def _objects(found: Instances, image: dict[str, Any], folder: str, masks: bool) -> Objects:
    own = found.annotations.get(image["id"], [])
    boxes = np.array([annotation["bbox"] for annotation in own], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = (image["height"], image["width"]) if "height" in image and "width" in image else None
    return Objects(
        f"{folder}{image['file_name']}", boxes,
        np.array([found.numbers[annotation["category_id"]] for annotation in own], dtype=np.int64),
        np.array([bool(annotation.get("iscrowd", 0)) for annotation in own], dtype=bool), size,
        [segmentation_of(found, annotation) for annotation in own] if masks else (),
    )  # fmt: skip
