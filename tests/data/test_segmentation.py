"""Label maps of VOC's and COCO's layouts, and the random crops of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.label_maps import scene, write_coco, write_voc_masks
from mvmr.data.segmentation import IGNORED, SegmentedImage, open_segmentation
from mvmr.data.segmentation_views import CropSettings, SegmentationViews, cut, shortened
from mvmr.data.sources import DataConfig
from mvmr.data.voc import VOC_CLASSES
from mvmr.data.workers import in_workers
from mvmr.types import RunError, UserError


def at(root: Path, name: str = "images") -> DataConfig:
    return DataConfig(name=name, root=root)


def numbers(source: object) -> list[int]:
    return [int(each.name.partition(".")[0]) for each in source]


# --- VOC ------------------------------------------------------------------------------------------------------------


def test_voc_2012_trains_on_train_and_tests_on_val(tmp_path: Path) -> None:
    base = write_voc_masks(tmp_path, {"train": [1, 2, 3], "val": [4, 5], "trainval": [1, 2, 3, 4, 5]})
    (base / "ImageSets/Segmentation/test.txt").write_text("000009\n")  # its label images are not public
    for root in (tmp_path, tmp_path / "VOCdevkit", base):
        train, test = (open_segmentation(at(root), split) for split in ("train", "test"))
        assert (numbers(train), numbers(test)) == ([1, 2, 3], [4, 5])
    assert train.classes == test.classes == ("background", *VOC_CLASSES)
    assert train.name == "images/train"
    assert train.fingerprint != test.fingerprint
    found, (image, labels, _) = test[1], scene(5)
    labels[0] = IGNORED
    assert found.labels.dtype == torch.int64
    assert np.array_equal(found.labels.numpy(), labels)
    assert found.image.shape == (3, 56, 64)
    assert (found.image.permute(1, 2, 0).float() - torch.from_numpy(image).float()).abs().mean() < 12  # JPEG


def test_the_augmented_list_and_the_year_2007(tmp_path: Path) -> None:
    write_voc_masks(tmp_path, {"train": [1, 2], "val": [3]})
    write_voc_masks(tmp_path, {"train_aug": [1, 2, 7, 8]}, masks="SegmentationClassAug")
    write_voc_masks(tmp_path, {"train": [1], "val": [2], "trainval": [1, 2], "test": [3, 4]}, year=2007)
    assert numbers(open_segmentation(at(tmp_path), "train")) == [1, 2, 7, 8]
    assert numbers(open_segmentation(at(tmp_path), "test")) == [3]
    assert numbers(open_segmentation(at(tmp_path, "voc07"), "train")) == [1, 2]
    assert numbers(open_segmentation(at(tmp_path, "voc07"), "test")) == [3, 4]
    listed = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"
    listed.write_text("/JPEGImages/000007.jpg /SegmentationClassAug/000007.png\n")
    assert numbers(open_segmentation(at(tmp_path), "train")) == [7]
    listed.rename(listed.with_name("trainaug.txt"))
    with pytest.warns(UserWarning, match=r"train_aug\.txt is missing, so the augmented set is left out"):
        assert numbers(open_segmentation(at(tmp_path), "train")) == [1, 2]
    assert numbers(open_segmentation(at(tmp_path), "test")) == [3]  # has nothing to do with it
    voc12 = at(tmp_path).model_copy(update={"name": "voc12"})
    assert numbers(open_segmentation(voc12, "test")) == [3]
    shutil.rmtree(tmp_path / "VOCdevkit/VOC2012")
    for root in (tmp_path, tmp_path / "VOCdevkit/VOC2007"):
        with pytest.raises(UserError, match=r"holds no label maps of VOC2012(.|\n)*ROOT/VOCdevkit/VOC2012/\n"):
            open_segmentation(voc12.model_copy(update={"root": root}), "test")
    write_voc_masks(tmp_path / "b", {"train": [1], "val": [2]})
    with pytest.raises(UserError, match=r"data\.name=voc07 needs(.|\n)*ROOT/VOCdevkit/VOC2007/\n"):
        open_segmentation(at(tmp_path / "b", "voc07"), "train")


def test_fingerprints_are_of_the_labels_wherever_they_lie(tmp_path: Path) -> None:
    write_voc_masks(tmp_path / "a", {"train": [1, 2], "val": [3]})
    write_coco(tmp_path / "a" / "coco", {"train2017": [1, 2], "val2017": [3]})
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # other times of change
    for below in ("", "coco"):
        first, second = (open_segmentation(at(tmp_path / name / below), "train") for name in ("a", "b"))
        assert (
            first.fingerprint == second.fingerprint != open_segmentation(at(tmp_path / "a" / below), "test").fingerprint
        )
    coco = open_segmentation(at(tmp_path / "a", "coco"), "train")  # also beside VOC
    assert coco.classes == ("background", "red", "green", "blue")
    before = open_segmentation(at(tmp_path / "a"), "train").fingerprint
    mask = tmp_path / "b/VOCdevkit/VOC2012/SegmentationClass/000001.png"
    size = mask.stat().st_size
    mask.write_bytes(mask.read_bytes()[:-1] + b"x")
    assert mask.stat().st_size == size
    assert open_segmentation(at(tmp_path / "b"), "train").fingerprint != before


def test_mistakes_in_voc_are_named(tmp_path: Path) -> None:
    base = write_voc_masks(tmp_path, {"train": [1, 2], "val": [3]})
    mask = base / "SegmentationClass/000003.png"
    source = open_segmentation(at(tmp_path), "test")
    Image.new("RGB", (64, 56)).save(mask)
    with pytest.raises(UserError, match=r"000003\.png: has mode RGB"):
        source[0]
    Image.fromarray(np.full((56, 64), 21, dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"000003\.png: has label 21; labels are 0 to 20"):
        source[0]
    Image.fromarray(np.zeros((50, 64), dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"label map is 50 x 64 and the image 56 x 64"):
        source[0]
    mask.write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"000003\.png: cannot be read"):
        source[0]
    mask.unlink()
    with pytest.raises(UserError, match=r"000003\.png is missing, one of 1 of the 1"):
        open_segmentation(at(tmp_path), "test")
    (base / "JPEGImages/000001.jpg").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"000001\.jpg.*out of the list"):
        open_segmentation(at(tmp_path), "train")[0]
    (base / "ImageSets/Segmentation/val.txt").write_text("")
    with pytest.raises(UserError, match=r"val\.txt is empty"):
        open_segmentation(at(tmp_path), "test")
    (base / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt is missing(.|\n)*SegmentationClass/\*\.png"):
        open_segmentation(at(tmp_path), "test")


def test_roots_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set"):
        open_segmentation(DataConfig(name="images"), "train")
    with pytest.raises(UserError, match=r"absent does not hold images\.(.|\n)*Found: no "):
        open_segmentation(at(tmp_path / "absent"), "train")
    with pytest.raises(UserError, match=r"holds no label maps(.|\n)*instances_train"):
        open_segmentation(at(tmp_path), "train")
    with pytest.raises(UserError, match="no pretrain"):
        open_segmentation(at(tmp_path), "pretrain")


# --- COCO -----------------------------------------------------------------------------------------------------------


def test_coco_is_painted_with_the_smaller_on_top_and_crowds_below(tmp_path: Path) -> None:
    runs = [56 * 60, 56 * 4]  # the last four columns
    crowd = {"category_id": 10, "iscrowd": 1, "segmentation": {"size": [56, 64], "counts": runs}}
    root = write_coco(tmp_path / "coco", {"train2017": [1, 2], "val2017": [3]}, extra={3: [crowd]})
    for place in (root, tmp_path):
        source = open_segmentation(at(place), "test")
        assert source.classes == ("background", "red", "green", "blue")  # by id
    labels, expected = source[0].labels.numpy(), scene(3)[1].astype(np.int64)
    only_crowd = np.zeros_like(expected, dtype=bool)
    only_crowd[:, 60:] = expected[:, 60:] == 0
    expected[only_crowd] = IGNORED
    assert np.array_equal(labels, expected)
    train = open_segmentation(at(root), "train")
    assert numbers(train) == [1, 2]
    for number, each in zip((1, 2), train, strict=True):
        assert np.array_equal(each.labels.numpy(), scene(number)[1])
        assert np.array_equal(each.image.permute(1, 2, 0).numpy(), scene(number)[0])


def test_the_order_of_the_annotations_does_not_decide(tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"train2017": [4]})
    before = open_segmentation(at(root), "train")
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"].reverse()
    file.write_text(json.dumps(content))
    after = open_segmentation(at(root), "train")
    assert torch.equal(before[0].labels, after[0].labels)
    assert before.fingerprint != after.fingerprint


def test_other_annotations_for_a_split(tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"train2017": [1, 2, 3]})
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    content["images"] = content["images"][1:]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 1]
    part = root / "annotations/instances_train2017-2-seed0-1of1.json"
    part.write_text(json.dumps(content))
    for name in (part, Path(part.name)):
        assert numbers(open_segmentation(at(root), "test", annotations=name)) == [2, 3]
    assert numbers(open_segmentation(at(root), "train")) == [1, 2, 3]  # the usual name before the others
    with pytest.raises(UserError, match=r"instances_val2017\.json is missing.*EVALUATION\.test_annotations=FILE"):
        open_segmentation(at(root), "test")
    with pytest.raises(UserError, match=r"absent\.json does not exist, nor"):
        open_segmentation(at(root), "test", annotations=Path("absent.json"))


def test_mistakes_in_coco_are_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"train2017": [1, 2]}, extra={1: [{"category_id": 10, "segmentation": [[1, 2]]}]})
    with pytest.raises(UserError, match=r"instances_train2017\.json: annotation 3: a polygon has 2 numbers"):
        open_segmentation(at(root), "train")[0]
    (root / "train2017/2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png is missing, one of 1 of the 2"):
        open_segmentation(at(root), "train")
    shutil.rmtree(root / "train2017")
    with pytest.raises(UserError, match=r"1\.png is missing, one of 2 of the 2 images"):
        open_segmentation(at(root), "train")


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA, a folder with coco128, is not set")
def test_real_outlines_are_what_cocos_own_tool_draws() -> None:
    mask_tool = pytest.importorskip("faster_coco_eval.core.mask")
    root = Path(os.environ["MVMR_TEST_DATA"]) / "coco128"
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    by_id = {each["id"]: number for number, each in enumerate(sorted(content["categories"], key=lambda c: c["id"]), 1)}
    source = open_segmentation(at(root), "train")
    same = total = 0
    for image, found in zip(sorted(content["images"], key=lambda each: each["id"])[:12], source, strict=False):
        expected = np.zeros((image["height"], image["width"]), dtype=np.int64)
        own = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        for each in sorted(own, key=lambda each: -each["area"]):
            runs = mask_tool.merge(mask_tool.frPyObjects(each["segmentation"], image["height"], image["width"]))
            expected[mask_tool.decode(runs).astype(bool)] = by_id[each["category_id"]]
        same += int((found.labels.numpy() == expected).sum())
        total += expected.size
    assert same / total > 0.99  # it draws outlines half a pixel wider


# --- crops ----------------------------------------------------------------------------------------------------------


def settings(**changes: object) -> CropSettings:
    return CropSettings(**{"size": 32, "scale": (0.5, 2.0), "flip": True, "fill": (9, 8, 7), **changes})  # type: ignore[arg-type]


def test_a_crop_cuts_image_and_labels_alike() -> None:
    # Labels are the image's own grey values, so that the two can be compared wherever they are cut.
    ramp = (torch.arange(40)[:, None] + torch.arange(50)[None] // 8 * 8).to(torch.uint8)
    image = ramp.expand(3, -1, -1).contiguous()
    generator = torch.Generator().manual_seed(0)
    shifted = 0
    for _ in range(30):
        drawn = torch.rand(4, generator=generator).tolist()
        crop, labels = cut(image, ramp, settings(), drawn)
        assert crop.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        known = labels != IGNORED
        assert (crop[:, ~known] == torch.tensor([9, 8, 7], dtype=torch.uint8)[:, None]).all()
        assert ((crop[0][known].int() - labels[known].int()).abs().float().mean()) < 3
        scaled = [round(side * (0.5 + 1.5 * drawn[0])) for side in (40, 50)]
        assert int(known.sum()) == min(scaled[0], 32) * min(scaled[1], 32)
        shifted += int(known.all())
        mirrored, _ = cut(image, ramp, settings(), [*drawn[:3], 0.9 if drawn[3] < 0.5 else 0.1])
        assert torch.equal(mirrored.flip(-1), crop)
    assert 0 < shifted < 30


def test_all_places_are_reached_and_none_else() -> None:
    image = torch.arange(5 * 7, dtype=torch.uint8).view(5, 7)
    one = settings(size=3, scale=(1.0, 1.0), flip=False)
    found = {
        int(cut(image.expand(3, -1, -1), image, one, [0.5, (y + 0.5) / 12, (x + 0.5) / 20, 0.9])[1][0, 0])
        for y in range(12)
        for x in range(20)
    }
    assert found == {7 * y + x for y in range(3) for x in range(5)}
    padded = cut(image.expand(3, -1, -1), image, settings(size=9, scale=(1.0, 1.0), flip=False), [0.5, 0.99, 0.0, 0.9])[
        1
    ]
    assert torch.equal(padded[4:, :7], image)
    assert (padded[:4] == IGNORED).all()
    assert (padded[:, 7:] == IGNORED).all()


def test_crops_are_a_function_of_seed_and_position(tmp_path: Path) -> None:
    source = open_segmentation(at(write_coco(tmp_path, {"train2017": [1, 2, 3, 4, 5]})), "train")
    views = SegmentationViews(source, settings(), seed=3)
    images, labels = views.batch(range(8))  # over the end of an epoch
    assert images.shape == (8, 3, 32, 32)
    assert (labels.shape, labels.dtype) == ((8, 32, 32), torch.int64)
    other = SegmentationViews(source, settings(), seed=3)
    for position in (7, 2, 5):
        image, label = other.crop(position)
        assert torch.equal(image, images[position])
        assert torch.equal(label.long(), labels[position])
    with_workers = list(
        in_workers(SegmentationViews(source, settings(), seed=3).batch, [range(4), range(4, 8)], workers=1)
    )
    assert torch.equal(torch.cat([each[0] for each in with_workers]), images)
    assert not torch.equal(SegmentationViews(source, settings(), seed=4).batch(range(8))[0], images)
    order = [int(place) for place in views._order[1]]
    assert sorted(order) == list(range(5))


def test_a_shorter_side_keeps_the_shape() -> None:
    whole = SegmentedImage(torch.zeros(3, 60, 90, dtype=torch.uint8), torch.full((60, 90), 255), "x")
    image, labels = shortened(whole, 30)
    assert (image.shape, labels.shape) == ((3, 30, 45), (30, 45))
    assert (labels == IGNORED).all()
    assert shortened(whole, None)[0] is whole.image
