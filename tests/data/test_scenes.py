"""Scenes against the XML and JSON that they are read from, on made trees and on real ones."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mvmr.data.coco import COCO_LAYOUT, draw_outline, read_coco
from mvmr.data.layouts import Wanted
from mvmr.data.scenes import SceneSource, open_scenes
from mvmr.data.sources import DataConfig
from mvmr.data.voc import VOC_CLASSES
from mvmr.data.voc_scenes import VOC0712_LAYOUT, VOC12_LAYOUT, read_voc0712
from mvmr.types import UserError
from scene_files import COLOURS, voc_annotation, write_coco, write_voc_squares


def config(root: Path, name: str) -> DataConfig:
    return DataConfig.model_construct(**{**dict(DataConfig()), "name": name, "root": root})


def by_search(file: Path) -> list[tuple[str, int, list[float]]]:
    """Class, difficult and box of an annotation's objects, by text search."""
    found = []
    for block in re.findall(r"<object>(.*?)</object>", file.read_text(), re.DOTALL):
        own = re.sub(r"<part>.*?</part>", "", block, flags=re.DOTALL)
        box = [float(re.findall(rf"<{key}>([\d.]+)</{key}>", own)[0]) for key in ("xmin", "ymin", "xmax", "ymax")]
        found.append((re.findall(r"<name>(\w+)</name>", own)[0], int("<difficult>1<" in own), box))
    return found


def check_voc(root: Path, split: str) -> SceneSource:
    source = open_scenes(config(root, "voc07"), split)
    assert source.classes == VOC_CLASSES
    for index in range(len(source)):
        scene = source[index]
        expected = by_search(source.root / scene.name.replace("JPEGImages", "Annotations").replace(".jpg", ".xml"))
        assert [VOC_CLASSES[label] for label in scene.labels.tolist()] == [name for name, _, _ in expected]
        assert scene.ignored.tolist() == [bool(flag) for _, flag, _ in expected]
        assert scene.boxes.tolist() == [[box[0] - 1, box[1] - 1, box[2], box[3]] for _, _, box in expected]
        height, width = scene.image.shape[1:]
        assert bool((scene.boxes >= 0).all() and (scene.boxes <= torch.tensor([width, height] * 2)).all())
        assert scene.masks is None
    return source


def test_voc_boxes_lie_on_their_squares(tmp_path: Path) -> None:
    root = write_voc_squares(tmp_path)
    train, test = check_voc(root, "train"), check_voc(root, "test")
    assert (len(train), len(test), train.name) == (6, 4, "voc07/train")
    assert [scene.ignored.any().item() for scene in map(test.__getitem__, range(4))] == [False, False, False, True]
    scene = train[0]
    for box, label in zip(scene.boxes.int().tolist(), scene.labels.tolist(), strict=True):
        inside = scene.image[:, box[1] + 2 : box[3] - 2, box[0] + 2 : box[2] - 2].float().mean((1, 2))
        assert inside.tolist() == pytest.approx(COLOURS[VOC_CLASSES[label]], abs=12)
    assert len(open_scenes(config(root / "VOCdevkit" / "VOC2007", "voc07"), "train")) == 6  # its folder or a parent
    assert train.take([4, 1])[0].name == train[4].name


def test_voc0712_trains_on_both_years(tmp_path: Path) -> None:
    write_voc_squares(tmp_path)
    write_voc_squares(tmp_path, train=3, year="VOC2012", seed=5)
    train = open_scenes(config(tmp_path, "voc0712"), "train")
    assert [scene.name.partition("/")[0] for scene in map(train.__getitem__, range(9))] == ["VOC2007"] * 6 + [
        "VOC2012"
    ] * 3
    assert len(open_scenes(config(tmp_path, "voc0712"), "test")) == 4
    wanted = Wanted("voc0712", "train", tmp_path, VOC0712_LAYOUT)
    source = read_voc0712(wanted)
    for index in range(9):
        scene = train[index]
        assert source.labels[index].nonzero()[:, 0].tolist() == sorted(set(scene.labels.tolist()))
        assert torch.equal(source.read(index), scene.image)
    test = read_voc0712(Wanted("voc0712", "test", tmp_path, VOC0712_LAYOUT))
    last = open_scenes(config(tmp_path, "voc0712"), "test")[3]
    expected = {label: -1 if (last.labels[last.ignored] == label).any() else 1 for label in last.labels.tolist()}
    for label in last.labels[~last.ignored].tolist():
        expected[label] = 1
    assert {k: int(test.labels[3, k]) for k in expected} == expected
    assert int(test.labels[3].count_nonzero()) == len(expected)
    assert read_voc0712(Wanted("voc0712", "pretrain", tmp_path, VOC0712_LAYOUT)).labels is None


def test_coco_boxes_masks_and_crowds(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    counts = [64 * 10 + 5, 20, 64 * 72 - 64 * 10 - 25]  # column 10, rows 5 to 24
    crowd = {"id": 99, "image_id": 2, "category_id": 17, "bbox": [10, 5, 1, 20], "area": 20, "iscrowd": 1,
             "segmentation": {"size": [64, 72], "counts": counts}}  # fmt: skip
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3] + [crowd]
    file.write_text(json.dumps(content))
    source = open_scenes(config(root, "coco"), "test", masks=True)
    assert source.classes == ("bird", "cat")  # of the ids 16 and 17, which the file has the other way round
    assert len(source) == 4
    for number in range(4):
        scene = source[number]
        own = [a for a in content["annotations"] if a["image_id"] == number + 1]
        assert scene.labels.tolist() == [a["category_id"] - 16 for a in own]
        assert scene.boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert scene.ignored.tolist() == [bool(a["iscrowd"]) for a in own]
        assert [int(mask.sum()) for mask in scene.masks] == [a["area"] for a in own]
        for mask, box in zip(scene.masks, scene.boxes.int().tolist(), strict=True):
            assert mask[box[1] : box[3], box[0] : box[2]].all()
    assert source[2].boxes.shape == (0, 4)  # an image without objects stays
    assert source[2].masks.shape == (0, 64, 72)
    assert open_scenes(config(root, "coco"), "test")[0].masks is None

    labels = read_coco(Wanted("coco", "test", root, COCO_LAYOUT)).labels
    for number in range(4):
        own = [a for a in content["annotations"] if a["image_id"] == number + 1]
        for category in (16, 17):
            flags = {a["iscrowd"] for a in own if a["category_id"] == category}
            assert int(labels[number, category - 16]) == (0 if not flags else 1 if 0 in flags else -1)


def test_masks_are_drawn_by_cocos_tool() -> None:
    pytest.importorskip("faster_coco_eval")
    polygons = [[2.0, 2.0, 9.5, 3.0, 6.0, 11.0], [10.0, 10.0, 14.0, 10.0, 14.0, 14.0]]
    drawn = draw_outline(polygons, 16, 20)
    assert drawn.shape == (16, 20)
    assert drawn[4, 6]
    assert drawn[11, 12]
    assert not drawn[15, 0]
    np.testing.assert_array_equal(drawn, draw_outline(polygons[:1], 16, 20) | draw_outline(polygons[1:], 16, 20))
    square = draw_outline([[3, 4, 9, 4, 9, 12, 3, 12]], 16, 20)
    assert square[4:12, 3:9].all()
    assert square.sum() == 48
    np.testing.assert_array_equal(draw_outline({"size": [2, 2], "counts": [1, 2, 1]}, 2, 2), [[0, 1], [1, 0]])
    assert not draw_outline([], 4, 4).any()


def test_voc12_tests_on_val(tmp_path: Path) -> None:
    base = write_voc_squares(tmp_path, train=5, year="VOC2012") / "VOCdevkit" / "VOC2012"
    names = [f"{number:06d}\n" for number in range(5)]
    (base / "ImageSets/Main/train.txt").write_text("".join(names[:3]))
    (base / "ImageSets/Main/val.txt").write_text("".join(names[3:]))
    for root in (tmp_path, tmp_path / "VOCdevkit", base):
        train, test = (open_scenes(config(root, "voc12"), split) for split in ("train", "test"))
        assert [objects.file for objects in test.objects] == [f"VOC2012/JPEGImages/00000{n}.jpg" for n in (3, 4)]
        assert len(train) == 3
    labelled = read_voc0712(Wanted("voc12", "test", tmp_path, VOC12_LAYOUT))
    for index in range(2):
        assert labelled.labels[index].nonzero()[:, 0].tolist() == sorted(set(test[index].labels.tolist()))
    assert len(read_voc0712(Wanted("voc12", "pretrain", tmp_path, VOC12_LAYOUT))) == 5
    (base / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt is missing"):
        open_scenes(config(tmp_path, "voc12"), "test")


def test_the_fingerprint_is_of_what_is_there(tmp_path: Path) -> None:
    first, second = (write_coco(tmp_path / name) for name in ("a", "b"))
    plain = open_scenes(config(first, "coco"), "train").fingerprint
    assert plain == open_scenes(config(second, "coco"), "train").fingerprint
    assert plain != open_scenes(config(first, "coco"), "test").fingerprint
    masked = open_scenes(config(first, "coco"), "train", masks=True).fingerprint
    assert masked != plain
    assert open_scenes(config(first, "coco"), "train").take([0, 1]).fingerprint != plain
    file = second / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"][0][0] += 1
    file.write_text(json.dumps(content))
    assert open_scenes(config(second, "coco"), "train").fingerprint == plain
    assert open_scenes(config(second, "coco"), "train", masks=True).fingerprint != masked


def test_what_is_wrong_with_voc(tmp_path: Path) -> None:
    root = write_voc_squares(tmp_path)
    base = root / "VOCdevkit" / "VOC2007"
    first = base / "Annotations" / "000000.xml"
    good = first.read_text()
    for text, message in (
        (voc_annotation([("bird", 0, (5, 5, 4, 9))], 72, 64), "a box without area"),
        (good.replace("<xmin>", "<xmin>x", 1), "bndbox.xmin 'x"),
        (good.replace("bird", "yeti").replace("cat", "yeti"), "yeti"),
        (good[:-5], "is no XML"),
    ):
        first.write_text(text)
        with pytest.raises(UserError, match=message):
            open_scenes(config(root, "voc07"), "train")
    first.write_text(good.replace("<width>72</width>", "<width>70</width>"))
    with pytest.raises(UserError, match=r"000000\.jpg is 72 x 64, its annotation says 70 x 64"):
        open_scenes(config(root, "voc07"), "train")[0]
    first.write_text(good)
    (base / "JPEGImages" / "000001.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match=r"data\.root: .*000001\.jpg: not an image.*take its image off the list"):
        open_scenes(config(root, "voc07"), "train")[1]
    first.unlink()
    with pytest.raises(UserError, match=r"000000\.xml is missing"):
        open_scenes(config(root, "voc07"), "train")
    with pytest.raises(UserError, match=r"VOC2012.*is missing"):
        open_scenes(config(root, "voc0712"), "train")
    (base / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(UserError, match=r"000002\.jpg is missing, one of 1 of 6"):
        open_scenes(config(root, "voc07"), "train")
    with pytest.raises(UserError, match=r"data\.root is not set"):
        open_scenes(DataConfig(name="voc07"), "train")


def test_as_one_class(tmp_path: Path) -> None:
    source = open_scenes(config(write_coco(tmp_path), "coco"), "train", masks=True)
    one = source.as_one_class()
    assert one.classes == ("object",)
    assert one.fingerprint != source.fingerprint
    for number in range(len(source)):
        assert one[number].labels.tolist() == [0] * len(source[number].labels)
        assert torch.equal(one[number].boxes, source[number].boxes)
        assert torch.equal(one[number].masks, source[number].masks)
    assert any(source[number].labels.any() for number in range(len(source)))


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA is not set")
def test_real_images() -> None:
    root = Path(os.environ["MVMR_TEST_DATA"])
    assert len(check_voc(root, "train")) > 10
    check_voc(root, "test")
    source = open_scenes(config(root / "coco128", "coco"), "train", masks=True)
    content = json.loads((root / "coco128/annotations/instances_train2017.json").read_text())
    areas = {a["id"]: a["area"] for a in content["annotations"]}
    by_image = {image["file_name"]: image["id"] for image in content["images"]}
    drawn, said = 0.0, 0.0
    for index in range(len(source)):
        scene = source[index]
        own = [a["id"] for a in content["annotations"] if a["image_id"] == by_image[Path(scene.name).name]]
        assert len(own) == len(scene.labels)
        drawn, said = drawn + float(scene.masks.sum()), said + sum(areas[identity] for identity in own)
    assert drawn == pytest.approx(said, rel=0.01)
