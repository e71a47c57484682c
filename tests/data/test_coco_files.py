"""COCO's files: which annotations and images are found, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mvmr.data.coco import COCO_LAYOUT, read_coco
from mvmr.data.layouts import Wanted
from mvmr.data.scenes import SCENES, open_scenes
from mvmr.data.segmentation import open_segmentation
from mvmr.data.sources import DataConfig
from mvmr.types import UserError
from scene_files import write_coco


def config(root: Path, name: str) -> DataConfig:
    return DataConfig.model_construct(**{**dict(DataConfig()), "name": name, "root": root})


def test_other_annotations_find_their_images(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    for image in content["images"]:  # names that val2017 does not have
        (root / "train2017" / image["file_name"]).rename(root / "train2017" / f"t{image['file_name']}")
        image["file_name"] = f"t{image['file_name']}"
    content["images"] = content["images"][4:]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 4]
    (tmp_path / "few.json").write_text(json.dumps(content))
    source = open_scenes(config(tmp_path, "coco"), "test", annotations=tmp_path / "few.json")
    assert [source[i].name for i in range(2)] == ["train2017/t000005.png", "train2017/t000006.png"]
    assert len(source) == 2


def test_one_rule_for_annotations_and_images(tmp_path: Path) -> None:
    """The same for scenes and for label maps: a name alone, one file of another year, images in another folder."""
    root = write_coco(tmp_path)
    usual, other = (root / "annotations" / f"instances_{split}.json" for split in ("val2017", "valminusminival"))
    usual.rename(other)
    (root / "val2017").rename(root / "pictures")
    for image in (content := json.loads(other.read_text()))["images"]:
        (root / "pictures" / image["file_name"]).rename(root / "pictures" / f"v{image['file_name']}")
        image["file_name"] = f"v{image['file_name']}"
    other.write_text(json.dumps(content))
    for given in (None, other, Path(other.name), Path("annotations") / other.name):
        scenes = open_scenes(config(root, "coco"), "test", annotations=given)
        maps = open_segmentation(config(root, "coco"), "test", annotations=given)
        assert scenes[0].name == "pictures/v000001.png"
        assert torch.equal(scenes[0].image, maps[0].image)
        assert (len(scenes), maps.classes[1:]) == (len(maps), scenes.classes)
    labels = read_coco(Wanted("coco", "test", root, COCO_LAYOUT))
    assert torch.equal(labels.read(0), scenes[0].image)
    other.with_name("instances_val_b.json").write_text("{}")
    for opened in (open_scenes, open_segmentation):
        with pytest.raises(UserError, match=r"instances_val2017\.json is missing.*test_annotations=FILE"):
            opened(config(root, "coco"), "test")


def changed(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_wrong_with_coco(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    good = file.read_text()
    one, image = (json.loads(good)[kind][0] for kind in ("annotations", "images"))
    for changes, message in (
        ({"annotations": [{**one, "category_id": 5}]}, "annotation 1 is of an image or category that is not there"),
        ({"annotations": [{**one, "bbox": [1, 2, -3, 4]}]}, "annotation 1 has a bbox that is none"),
        ({"annotations": [{"id": 1}]}, "no file of COCO's instances: KeyError"),
        ({"images": [], "annotations": []}, "has no images"),
        ({"images": 3}, "give a file of instances"),
        ({"images": [{**image, "id": "1"}]}, "id '1' is no whole number"),
        ({"images": [{**image, "id": True}]}, "id True is no whole number"),
        ({"images": [{**image, "width": "a"}]}, "image 1 has width 'a'"),
        ({"images": [{**image, "height": 0}]}, "image 1 has height 0"),
        ({"images": [{**image, "file_name": 5}]}, "image 1 has file_name 5"),
        ({"images": [{**image, "file_name": "../a.png"}]}, "image 1 has file_name '../a.png'"),
        ({"annotations": [{**one, "image_id": "1"}]}, "image_id '1' is no whole number"),
        ({"annotations": [{**one, "category_id": 16.0}]}, "category_id 16.0 is no whole number"),
        ({"annotations": [{**one, "iscrowd": None}]}, "annotation 1 has iscrowd None"),
        ({"annotations": [{**one, "bbox": ["1", 2, 3, 4]}]}, "annotation 1 has a bbox that is none"),
        ({"categories": [{"id": "1", "name": "cat"}]}, "id '1' is no whole number"),
    ):
        changed(file, **changes)
        with pytest.raises(UserError, match=rf"instances_train2017\.json.*{message}"):
            open_scenes(config(root, "coco"), "train")
        file.write_text(good)
    for outline, message in (
        ([[1, 2, 3]], "a polygon has 3 numbers"),
        ([["a"] * 6], "no number"),
        ([], "it has no segmentation"),
        (None, "it has no segmentation"),
        ("rle", "a segmentation is str"),
    ):
        changed(file, annotations=[{**one, "segmentation": outline}])
        with pytest.raises(UserError, match=rf"instances_train2017\.json: annotation 1: .*{message}.*correct the file"):
            open_scenes(config(root, "coco"), "train", masks=True)
        assert len(open_scenes(config(root, "coco"), "train")) == 6  # boxes are all that is asked for
    changed(file, annotations=[{name: value for name, value in one.items() if name != "segmentation"}])
    with pytest.raises(UserError, match="it has no segmentation"):
        open_scenes(config(root, "coco"), "train", masks=True)
    changed(file, annotations=[{**one, "iscrowd": 1, "segmentation": []}])
    assert not open_scenes(config(root, "coco"), "train", masks=True)[0].masks.any()
    changed(file, annotations=[{**one, "segmentation": {"size": 5, "counts": [1]}}])
    with pytest.raises(UserError, match=r"000001\.png: a mask has size 5"):
        open_scenes(config(root, "coco"), "train", masks=True)[0]
    file.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        open_scenes(config(root, "coco"), "train")
    file.write_text(good)
    (root / "train2017" / "000002.png").unlink()
    with pytest.raises(UserError, match=r"train2017.000002\.png is missing, one of 1 of the 6"):
        open_scenes(config(root, "coco"), "train")
    with pytest.raises(UserError, match=r"none\.json does not exist, nor does it in .*annotations.*mvmr splits"):
        open_scenes(config(root, "coco"), "train", annotations=tmp_path / "none.json")
    file.unlink()
    with pytest.raises(UserError, match=r"instances_train2017\.json is missing[\s\S]*data\.root=ROOT"):
        open_scenes(config(root, "coco"), "train")
    assert set(SCENES) >= {"voc07", "voc0712", "coco"}
