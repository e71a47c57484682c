"""Detection and instance segmentation: they learn squares, resume bit for bit, and leave the encoder alone."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mvmr.data.scenes import open_scenes
from mvmr.data.sources import DataConfig
from mvmr.evaluation import Workplace
from mvmr.evaluation.detection import DetectionConfig, detection
from mvmr.evaluation.detector_batches import as_taken, mirrored, step_images
from mvmr.evaluation.detector_training import DETECTOR_FILE, trained_detector
from mvmr.evaluation.instance import InstanceConfig, instance
from mvmr.evaluation.resume import FILE
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import random_encoder
from mvmr.types import RunError, UserError
from scene_files import write_coco, write_voc_squares
from states import same, state

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "iterations": 4, "batch_size": 2, "lr": 0.01, "warmup": 1, "min_size": 64, "max_size": 96, "train_sizes": (48, 64),
    "anchors_per_image": 32, "regions_per_image": 16, "proposals": 40,
    "precise_batch_norm": 0,
}  # fmt: skip
LEARNING: dict[str, Any] = {
    **SMALL, "iterations": 30, "batch_size": 4, "lr": 0.03, "drops": (0.8,), "train_sizes": (64,),
    "precise_batch_norm": 5,
}  # fmt: skip
NARROW: dict[str, Any] = {"levels": (2, 3, 4), "pyramid_width": 16, "hidden": 32}


def tiny(**changes: Any) -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(width=0.125, stem="cifar"), dim=64, image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3,
        method="mvmr", data="digits", version="0",
    )  # fmt: skip
    return random_encoder(card.model_copy(update=changes), seed=0)


def data_at(root: Path, name: str = "voc07") -> DataConfig:
    return DataConfig.model_construct(**{**dict(DataConfig()), "name": name, "root": root})


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return data_at(write_voc_squares(tmp_path_factory.mktemp("voc"), train=8, test=8))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return data_at(write_coco(tmp_path_factory.mktemp("coco"), train=8, val=8), "coco")


def test_it_learns_squares_and_leaves_the_encoder_alone(voc: DataConfig, tmp_path: Path) -> None:
    encoder = tiny()
    encoder.backbone.layer1.train()  # a mode of its own, to be found again
    before, flags, drawn = state(encoder), [part.training for part in encoder.modules()], torch.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    place = Workplace(CPU, out=tmp_path, progress=lambda *report: seen.append(report))
    config = DetectionConfig(head="fpn", **LEARNING, **NARROW)
    metrics = detection(encoder, voc, config, place)
    assert metrics.keys() == {
        "ap", "ap50", "ap75", "ap_voc07", "ap50_voc07", "ap75_voc07", "loss_first", "loss_last", "n_train"
    }  # fmt: skip
    assert metrics["loss_last"] < 0.7 * metrics["loss_first"]  # three seeds gave 0.33 to 0.42
    untrained = config.model_copy(update={"iterations": 1, "lr": 1e-9, "precise_batch_norm": 0})
    assert metrics["ap50"] > detection(encoder, voc, untrained, Workplace(CPU))["ap50"] + 15  # 49 to 99, and 0
    assert metrics["n_train"] == 8
    assert ("training for detection", 30, 30) in seen
    assert ("detecting in voc07/test", 8, 8) in seen
    assert same(state(encoder), before)
    assert [part.training for part in encoder.modules()] == flags
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert ("measuring batch norm for detection", 5, 5) in seen
    with safe_open(str(tmp_path / DETECTOR_FILE), "pt") as file:
        card = json.loads(file.metadata()["mvmr_detector"])
    kept = torch.load(tmp_path / FILE, weights_only=True)["state"]["detector"]  # left for the session to remove
    saved = load_file(tmp_path / DETECTOR_FILE)
    assert saved.keys() == kept.keys()
    for key, value in saved.items():  # but for what was measured anew after the last step
        assert torch.equal(value, kept[key]) or "running_" in key or "num_batches" in key, key
    assert (card["evaluation"], card["data"], len(card["classes"])) == ("detection", "voc07/train", 20)


def test_the_c4_head_learns_too(voc: DataConfig) -> None:
    metrics = detection(tiny(), voc, DetectionConfig(**LEARNING), Workplace(CPU))
    assert metrics["loss_last"] < 0.7 * metrics["loss_first"]  # three seeds gave 0.39 to 0.45
    assert metrics["ap50"] > 15  # 63 to 70


def killed_after(steps: int, what: str) -> Any:
    def progress(told: str, done: int, total: int) -> None:
        if told.startswith(what) and done == steps:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("kind", ["c4", "fpn", "masks"])
def test_a_killed_training_ends_as_if_it_had_not_been(
    kind: str, voc: DataConfig, coco: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmr.evaluation.detector_training.KEPT_EVERY", 0.0)
    encoder, threads = tiny(), torch.get_num_threads()
    torch.set_num_threads(1)
    small = {**SMALL, "score_threshold": 0.0, "precise_batch_norm": 2}
    narrow = {**small, **NARROW}
    evaluated, data, config = {
        "c4": (detection, voc, DetectionConfig(**small)),
        "fpn": (detection, voc, DetectionConfig(head="fpn", **narrow)),
        "masks": (instance, coco, InstanceConfig(**{**narrow, "iterations": 3}, mask_layers=(8,))),
    }[kind]
    try:
        whole = evaluated(encoder, data, config, Workplace(CPU, out=tmp_path / "whole"))
        for moment in (killed_after(2, "training"), killed_after(1, "detecting")):
            with pytest.raises(KeyboardInterrupt):
                evaluated(encoder, data, config, Workplace(CPU, out=tmp_path / "killed", progress=moment))
            assert (tmp_path / "killed" / FILE).exists()
        seen: list[str] = []
        place = Workplace(CPU, out=tmp_path / "killed", progress=lambda told, *_: seen.append(told))
        assert evaluated(encoder, data, config, place) == whole
        assert not any(told.startswith("training for") for told in seen)  # it had ended when it was killed again
        assert (tmp_path / "killed" / FILE).exists()  # the result is not written yet
        first, second = ((tmp_path / of / DETECTOR_FILE).read_bytes() for of in ("whole", "killed"))
        assert first == second
        other = config.model_copy(update={"seed": 1})
        evaluated(encoder, data, other, Workplace(CPU, out=tmp_path / "other"))
        assert (tmp_path / "other" / DETECTOR_FILE).read_bytes() != first
    finally:
        torch.set_num_threads(threads)


def test_instance_measures_boxes_and_masks(coco: DataConfig) -> None:
    config = InstanceConfig(**LEARNING, **NARROW, mask_layers=(16,))
    metrics = instance(tiny(), coco, config, Workplace(CPU))
    assert metrics.keys() == {
        *(f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")),
        "loss_first", "loss_last", "n_train",
    }  # fmt: skip
    assert metrics["loss_last"] < 0.85 * metrics["loss_first"]  # three seeds gave 0.46 to 0.71
    assert min(metrics["box_ap50"], metrics["mask_ap50"]) > 15  # 59 to 96
    assert metrics.statistics.keys() == {key for key in metrics if "_ap" in key}
    assert metrics.images == 8


def test_all_classes_as_one(voc: DataConfig, coco: DataConfig, tmp_path: Path) -> None:
    for evaluated, data, kind in ((detection, voc, DetectionConfig), (instance, coco, InstanceConfig)):
        config = kind(**{**SMALL, **NARROW, "iterations": 1}, head="fpn", one_class=True)
        evaluated(tiny(), data, config, Workplace(CPU, out=tmp_path / evaluated.__name__))
        with safe_open(str(tmp_path / evaluated.__name__ / DETECTOR_FILE), "pt") as file:
            assert json.loads(file.metadata()["mvmr_detector"])["classes"] == ["object"]
            assert file.get_tensor("roi_heads.box_predictor.cls_score.weight").shape[0] == 2


def test_batch_norm_is_trained_on_or_frozen(voc: DataConfig) -> None:
    encoder, train = tiny(), open_scenes(voc, "train")
    for frozen in (False, True):
        config = DetectionConfig(head="fpn", freeze_batch_norm=frozen, **SMALL, **NARROW)
        detector = trained_detector(encoder, train, config, Workplace(CPU), key="detection").detector
        tuned = {key.removeprefix("backbone.maps."): value for key, value in detector.state_dict().items()}
        assert torch.equal(tuned["stem.1.running_mean"], encoder.backbone.bn1.running_mean) == frozen
        assert torch.equal(tuned["stem.1.weight"], encoder.backbone.bn1.weight) == frozen
        assert not torch.equal(tuned["stem.0.weight"], encoder.backbone.conv1.weight)


def test_precise_batch_norm_is_the_mean_over_batches(voc: DataConfig) -> None:
    """Of the stem's norm, whose inputs depend on no draw but the images: by hand, from its own inputs."""
    config = DetectionConfig(head="fpn", **{**SMALL, **NARROW, "precise_batch_norm": 3, "train_sizes": (64,)})
    source, place = open_scenes(voc, "train"), Workplace(CPU)
    detector = trained_detector(tiny(), source, config, place, key="detection").detector
    norm = detector.backbone.maps.stem[1]
    assert norm.momentum == 0.1
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().transpose(0, 1).flatten(1)))
    measured = norm.running_mean.clone(), norm.running_var.clone()
    for step in range(4, 7):  # after the four of the training
        chosen = step_images(range(8), step, batch_size=2, flip=True, seed=0)
        images = [source[position].image.flip(-1) if flip else source[position].image for position, flip in chosen]
        detector.backbone(detector.transform([image / 255 for image in images])[0].tensors)
    torch.testing.assert_close(measured[0], torch.stack([each.mean(1) for each in seen]).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(measured[1], torch.stack([each.var(1) for each in seen]).mean(0), atol=1e-5, rtol=1e-4)


def test_what_a_detector_is_given(coco: DataConfig) -> None:
    scene = open_scenes(coco, "train", masks=True)[0]
    turned = mirrored(scene)
    for box, mask in zip(turned.boxes.int().tolist(), turned.masks, strict=True):
        assert mask[box[1] : box[3], box[0] : box[2]].all()
        assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])
        assert mask.nonzero().min(0).values.tolist() == [box[1], box[0]]
    assert torch.equal(mirrored(turned).image, scene.image)
    assert torch.equal(mirrored(turned).boxes, scene.boxes)
    boxes = torch.tensor([[-5.0, 2, 30, 20], [4, 4, 4, 9], [10, 10, 999, 999], [3, 3, 9, 9]])
    odd = replace(scene, boxes=boxes, labels=torch.tensor([0, 1, 1, 0]), masks=scene.masks[:1].expand(4, -1, -1),
                  ignored=torch.tensor([False, False, False, True]))  # fmt: skip
    (image,), (target,) = as_taken([odd], CPU, with_ignored=False)
    assert target["boxes"].tolist() == [[0, 2, 30, 20], [10, 10, 72, 64]]  # inside, with area, not ignored
    assert target["labels"].tolist() == [1, 2]
    assert len(target["masks"]) == 2
    assert 0.9 < float(image.max()) <= 1
    assert as_taken([odd], CPU, with_ignored=True)[1][0]["labels"].tolist() == [1, 2, 1]


def test_training_on_difficult_objects_is_a_choice(voc: DataConfig) -> None:
    train = open_scenes(voc, "test")  # its last image has a difficult object
    alone = train.take([len(train) - 1])
    for objects in alone.objects:
        objects.ignored[:] = True
    config, place = DetectionConfig(head="fpn", **{**SMALL, **NARROW, "iterations": 1}), Workplace(CPU)
    with pytest.raises(UserError, match="no training image has an object"):
        trained_detector(tiny(), alone, config, place, key="detection")
    assert len(trained_detector(tiny(), alone, config, place, key="detection", with_ignored=True).losses) == 1


def test_mistakes_are_named(voc: DataConfig, coco: DataConfig, tmp_path: Path) -> None:
    place, config = Workplace(CPU), DetectionConfig(head="fpn", **SMALL, **NARROW)
    with pytest.raises(UserError, match=r"data\.name=digits has no boxes.*voc07"):
        detection(tiny(), DataConfig(name="digits"), config, place)
    with pytest.raises(UserError, match=r"voc07 has no masks of single objects.*coco"):
        instance(tiny(), voc, InstanceConfig(**SMALL), place)
    with pytest.raises(UserError, match=r"files of COCO's instances, and data\.name=voc07"):
        detection(tiny(), voc, config.model_copy(update={"train_annotations": tmp_path}), place)
    content = json.loads((coco.root / "annotations/instances_val2017.json").read_text())
    for change, message in (
        ({"categories": content["categories"] + [{"id": 99, "name": "dog"}]}, "different classes: dog"),
        ({"annotations": []}, r"coco/test has no object that counts.*files as detection\.train_annotations"),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            detection(tiny(), coco, config.model_copy(update={"test_annotations": tmp_path / "other.json"}), place)
    with pytest.raises(UserError, match=r"detection: levels=\[2, 7\]"):
        detection(tiny(), voc, config.model_copy(update={"levels": (2, 7)}), place)
    for wrong, message in (
        ({"drops": (3.0,)}, "give shares between 0 and 1, in order"),
        ({"drops": (0.9, 0.7)}, "in order"),
        ({"train_sizes": (64, 8)}, "greater than or equal to 16"),
        ({"train_sizes": ()}, "at least 1 item"),
    ):
        with pytest.raises(ValueError, match=message):
            InstanceConfig(**wrong)
    shutil.copytree(voc.root, tmp_path / "voc")
    for file in (tmp_path / "voc/VOCdevkit/VOC2007/Annotations").iterdir():
        file.write_text(file.read_text().replace("<difficult>0<", "<difficult>1<"))
    with pytest.raises(UserError, match=r"voc07/test has no object that counts; put the whole archive"):
        detection(tiny(), data_at(tmp_path / "voc"), config, place)
    with pytest.raises(RunError, match=r"loss is (nan|inf).*lower detection\.lr"):
        detection(tiny(), voc, config.model_copy(update={"lr": 1e30, "warmup": 0}), place)


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA is not set")
def test_on_real_images() -> None:
    root = Path(os.environ["MVMR_TEST_DATA"])
    config = DetectionConfig(head="fpn", **{**SMALL, **NARROW, "iterations": 2})
    assert detection(tiny(), data_at(root), config, Workplace(CPU))["n_train"] > 10
