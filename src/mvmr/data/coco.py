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

from mvmr.data.coco_masks import to_mask
from mvmr.data.images import FileSource
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


def coco_scenes(wanted: Wanted, *, masks: bool = False, annotations: Path | None = None) -> SceneSource:
    """Scenes of COCO 2017: train from train2017, test from val2017; crowds are `ignored`, images without objects kept.

    annotations: another file of instances, with images in either folder. Raises UserError.
    """
    found, root, folder = _read(wanted, annotations)
    objects = [_objects(found, image, folder, masks) for image in found.images]
    return SceneSource(root, objects, name=wanted.title, classes=found.classes, draw=draw_outline if masks else None)


def read_coco(wanted: Wanted) -> FileSource:
    """The images of COCO 2017 with labels [N, C] int8: 1 for a class that is shown, -1 where only as a crowd."""
    found, root, folder = _read(wanted, None)
    labels = torch.zeros(len(found.images), len(found.classes), dtype=torch.int8)
    for row, image in enumerate(found.images):
        for annotation in sorted(found.annotations.get(image["id"], ()), key=lambda a: -int(a.get("iscrowd", 0))):
            labels[row, found.numbers[annotation["category_id"]]] = -1 if annotation.get("iscrowd", 0) else 1
    return FileSource(
        root, [f"{folder}{image['file_name']}" for image in found.images],
        None if wanted.split == "pretrain" else labels, name=wanted.title, classes=found.classes,
    )  # fmt: skip


def read_instances(file: Path) -> Instances:
    """A JSON of COCO's instances. Raises UserError that names the file, for what is none."""
    try:
        content = json.loads(file.expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); take it from the archive again") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{file} has no images and annotations; give a file of instances, not captions or keypoints")
    try:
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        images = sorted(content["images"], key=lambda image: int(image["id"]))
        ids = {int(image["id"]) for image in images if str(image["file_name"])}
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            if annotation["category_id"] not in names or annotation["image_id"] not in ids:
                raise UserError(
                    f"{file}: annotation {annotation.get('id')} is of an image or category that is not there"
                )
            left, top, width, height = map(float, annotation["bbox"])
            if not np.isfinite([left, top, width, height]).all() or min(width, height) < 0:
                raise UserError(f"{file}: annotation {annotation.get('id')} has a bbox that is none")
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no file of COCO's instances: {type(error).__name__} {error}") from None
    except ValueError as error:
        raise UserError(str(error) if isinstance(error, UserError) else f"{file}: {error}") from None
    if not images or not names or len(ids) < len(images):
        raise UserError(f"{file} has no images, no categories, or an image id twice")
    numbers = {identity: number for number, identity in enumerate(sorted(names))}
    return Instances(file, images, by_image, numbers, tuple(names[identity] for identity in numbers))


def draw_outline(segmentation: Any, height: int, width: int) -> np.ndarray:
    """[height, width] bool of polygons or run lengths, polygons as COCO's own tool draws them.

    Raises UserError where the package that has this tool is missing, and for what is no segmentation.
    """
    drawn = to_mask(segmentation, height, width)  # run lengths are exact, and what is none is refused here
    if isinstance(segmentation, Mapping):
        return drawn
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise UserError("masks are drawn by faster-coco-eval: pip install 'mvmr[detection]'") from None
    if not segmentation:
        return drawn
    lengths = mask.merge(mask.frPyObjects(segmentation, height, width))
    return np.asarray(mask.decode(lengths)).reshape(height, width).astype(bool)


def _read(wanted: Wanted, annotations: Path | None) -> tuple[Instances, Path, str]:
    """The instances, data.root, and the folder of the images below it, with a slash."""
    root = wanted.either("coco", "COCO")
    own = FOLDERS[wanted.split == "test"]
    file = root / "annotations" / f"instances_{own}.json" if annotations is None else annotations.expanduser()
    if not file.is_file():
        if annotations is not None:
            raise UserError(
                f"{annotations} does not exist; give a file of COCO's instances, such as `mvmr splits` makes"
            )
        raise wanted.wrong(root, f"{file} is missing")
    found = read_instances(file)
    wrong = ""
    for folder in sorted(FOLDERS, key=lambda name: name != own):
        there = {entry.name for entry in os.scandir(root / folder)} if (root / folder).is_dir() else set()
        missing = [image["file_name"] for image in found.images if image["file_name"] not in there]
        if not missing:
            return found, root, f"{folder}/"
        wrong = (
            wrong
            or f"{root / folder / missing[0]} is missing, one of {len(missing)} of the {len(found.images)} in {file}"
        )
        if annotations is None:
            break
    raise wanted.wrong(root, wrong)


def _objects(found: Instances, image: dict[str, Any], folder: str, masks: bool) -> Objects:
    own = found.annotations.get(image["id"], [])
    boxes = np.array([annotation["bbox"] for annotation in own], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None
    return Objects(
        f"{folder}{image['file_name']}", boxes,
        np.array([found.numbers[annotation["category_id"]] for annotation in own], dtype=np.int64),
        np.array([bool(annotation.get("iscrowd", 0)) for annotation in own], dtype=bool), size,
        [annotation.get("segmentation", []) for annotation in own] if masks else (),
    )  # fmt: skip
