"""Semantic segmentation learns from label maps, leaves the encoder alone and goes on where it was stopped."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import mvmr.evaluation.semantic as module
from data.label_maps import scene, write_coco, write_voc_masks
from mvmr.data.segmentation import open_segmentation
from mvmr.data.sources import DataConfig
from mvmr.evaluation.confusions import confusion, mean_iou
from mvmr.evaluation.resume import FILE, Resumable
from mvmr.evaluation.semantic import SemanticConfig, confusions_of, semantic, train_segmenter
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.segmenters import build_segmenter
from mvmr.nets.weights import random_encoder
from mvmr.types import RunError, UserError
from states import same, state

CPU = torch.device("cpu")
PLACE = Workplace(CPU)
SHORT: dict[str, Any] = {
    "iterations": 6, "batch_size": 2, "crop": 40, "lr": 0.05, "head_channels": 8, "head_dilation": 1,
    "dilation": "torchvision",
}  # fmt: skip


def tiny(width: float = 0.0625, name: str = "resnet18") -> Encoder:
    given = {} if name.startswith("timm:") else {"stem": "mvmr", "width": width, "zero_init_residual": False}
    card = EncoderCard(
        encoder=EncoderConfig(name=name, **given), dim=32, image_size=32, mean=(0.3,) * 3, std=(0.3,) * 3,
        method="m", data="d", version="0",
    )  # fmt: skip
    return random_encoder(card, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = write_coco(tmp_path_factory.mktemp("coco"), {"train2017": list(range(12)), "val2017": list(range(50, 56))})
    return DataConfig(name="images", root=root)


def test_the_defaults_are_mocos() -> None:
    config = SemanticConfig()
    assert (config.crop, config.scale, config.flip) == (513, (0.5, 2.0), True)
    assert (config.iterations, config.batch_size, config.lr, config.drops) == (30_000, 16, 0.003, (0.7, 0.9))
    assert config.weight_decay == 1e-4
    assert (config.head_channels, config.head_convolutions, config.head_dilation, config.dilation) == (
        256,
        2,
        6,
        "moco",
    )


def test_it_learns_coloured_squares(data: DataConfig) -> None:
    learning = {"iterations": 120, "batch_size": 4, "crop": 48, "lr": 0.3, "drops": (0.8,), "scale": (0.8, 1.25)}
    head = {"head_channels": 32, "head_convolutions": 1}
    config = SemanticConfig(**{**SHORT, **learning, **head})
    encoder = tiny()
    before, mode = state(encoder), [part.training for part in encoder.modules()]
    done: list[tuple[str, int, int]] = []
    found = semantic(encoder, data, config, Workplace(CPU, progress=lambda *told: done.append(told)))
    assert same(before, state(encoder))
    assert mode == [part.training for part in encoder.modules()]
    assert found["loss_last"] < 0.5 * found["loss_first"]
    test = open_segmentation(data, "test")
    untrained = build_segmenter(encoder, 4, dilation="torchvision", channels=32, convolutions=1, head_dilation=1)
    start = mean_iou(confusions_of(untrained, test, config, PLACE).sum(0))
    assert found["miou"] > start + 20
    assert found["pixel_accuracy"] > 80
    assert found["miou_low"] <= found["miou"] <= found["miou_high"]
    assert found["n_train"] == 12
    assert {"iou/background", "iou/red", "iou/green", "iou/blue"} <= set(found)
    assert done[119] == ("training on label maps", 120, 120)
    assert done[-1] == ("testing on label maps", 6, 6)


def test_miou_is_of_whole_images_at_their_own_size(data: DataConfig) -> None:
    segmenter = build_segmenter(tiny(), 4, channels=8, seed=1)
    # So that it says more than one class; a seed of its own, whatever ran before.
    nn.init.normal_(segmenter.head[-1].weight, std=1.0, generator=torch.Generator().manual_seed(8))
    modes = [part.training for part in segmenter.modules()]
    test = open_segmentation(data, "test")
    for short_side in (None, 32):
        matrices = confusions_of(segmenter, test, SemanticConfig(short_side=short_side), PLACE)
        assert matrices.shape == (6, 4, 4)
        assert matrices.sum((1, 2)).tolist() == [56 * 64] * 6
        assert modes == [part.training for part in segmenter.modules()]
        with torch.no_grad():
            image = test[3].image[None]
            if short_side:
                image = functional.interpolate(image, size=(32, 37), mode="bilinear", antialias=True)
            scores = copy.deepcopy(segmenter).eval().scores(image)
            predicted = functional.interpolate(scores, size=(56, 64), mode="bilinear").argmax(1)[0]
        assert len(predicted.unique()) > 1
        assert torch.equal(matrices[3].long(), confusion(predicted, torch.from_numpy(scene(53)[1]).long(), 4))


class Killed(Exception):
    pass


def killed_after(steps: int, out: Path, what: str = "training") -> Workplace:
    def progress(told: str, done: int, total: int) -> None:
        if told.startswith(what) and done == steps:
            raise Killed

    return Workplace(CPU, out=out, progress=progress)


def test_a_killed_training_goes_on_bit_for_bit(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Resumable", lambda folder, settings: Resumable(folder, settings, every_seconds=0))
    config = SemanticConfig(**SHORT)
    whole = semantic(tiny(), data, config, Workplace(CPU, out=tmp_path / "whole"))
    for steps in (5, 2):  # under other settings first: what it leaves is not taken up
        other = config if steps == 2 else config.model_copy(update={"lr": 0.01})
        with pytest.raises(Killed):
            semantic(tiny(), data, other, killed_after(steps, tmp_path / "parts"))
    assert (tmp_path / "parts" / FILE).is_file()
    seen: list[int] = []
    again = Workplace(CPU, out=tmp_path / "parts", progress=lambda what, done, total: seen.append(done))
    resumed = semantic(tiny(), data, config, again)
    assert seen[0] == 3
    assert dict(resumed) == dict(whole)
    first, second = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("whole", "parts"))
    assert same(first, second)
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["segmenter.safetensors", FILE]


def test_a_kill_while_testing_costs_no_step(data: DataConfig, tmp_path: Path) -> None:
    """At the usual distance between states: the last one is kept without it."""
    config, seen = SemanticConfig(**SHORT), []
    with pytest.raises(Killed):
        semantic(tiny(), data, config, killed_after(2, tmp_path, "testing"))
    before = (tmp_path / "segmenter.safetensors").read_bytes()
    again = Workplace(CPU, out=tmp_path, progress=lambda what, done, total: seen.append(what))
    found = semantic(tiny(), data, config, again)
    assert set(seen) == {"testing on label maps"}
    assert (tmp_path / "segmenter.safetensors").read_bytes() == before
    assert dict(found) == dict(semantic(tiny(), data, config, PLACE))


def test_a_full_disk_after_the_training_is_told(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / module.SEGMENTER_FILE).mkdir()
    with pytest.raises(RunError, match=r"segmenter\.safetensors: cannot be written.*the training is kept"):
        semantic(tiny(), data, SemanticConfig(**SHORT), Workplace(CPU, out=tmp_path))
    assert (tmp_path / FILE).is_file()


def test_another_encoder_or_other_images_begin_anew(data: DataConfig, tmp_path: Path) -> None:
    source, test = (open_segmentation(data, split) for split in ("train", "test"))
    config, place = SemanticConfig(**SHORT), Workplace(CPU, out=tmp_path)
    wider = tiny()
    wider.backbone.conv1.weight.data += 1
    settings = {
        module._resumable(encoder, images, config, place).settings
        for encoder, images in ((tiny(), source), (wider, source), (tiny(), test))
    }
    assert len(settings) == 3
    assert module._resumable(tiny(), source, config, place).settings in settings


def test_what_is_frozen_stays(data: DataConfig) -> None:
    source, encoder = open_segmentation(data, "train"), tiny()
    frozen, _ = train_segmenter(encoder, source, SemanticConfig(**SHORT, freeze_encoder=True), PLACE)
    assert same(state(frozen.backbone), state(encoder.backbone))
    assert not torch.equal(
        frozen.head[0].weight,
        build_segmenter(encoder, 4, channels=8, head_dilation=1, dilation="torchvision").head[0].weight,
    )
    normed, _ = train_segmenter(encoder, source, SemanticConfig(**SHORT, freeze_batch_norm=True), PLACE)
    for name, value in normed.backbone.state_dict().items():
        statistic = "running" in name or "num_batches" in name
        assert torch.equal(value, encoder.backbone.state_dict()[name]) == statistic, name


def test_rates_fall_and_the_head_has_its_own(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *given: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    config = SemanticConfig(**{**SHORT, "iterations": 10, "lr": 0.01, "head_lr": 0.1})
    train_segmenter(tiny(), open_segmentation(data, "train"), config, PLACE)
    assert rates == [pytest.approx([0.01 * f, 0.1 * f]) for f in [1.0] * 7 + [0.1] * 2 + [0.01]]


def test_mistakes_are_named(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ResNets only"):
        semantic(tiny(name="timm:test_vit"), data, SemanticConfig(**SHORT), PLACE)
    broken = tiny()
    broken.backbone.bn1.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"the loss is nan at step 1; lower semantic\.lr"):
        semantic(broken, data, SemanticConfig(**SHORT), PLACE)
    write_voc_masks(tmp_path, {"train": [1], "val": [2]})
    other = DataConfig(name="images", root=tmp_path)
    file = Path(str(data.root)) / "annotations/instances_train2017.json"
    (tmp_path / "train2017").symlink_to(Path(str(data.root)) / "train2017")
    with pytest.raises(UserError, match=r"different classes \(aeroplane.*semantic\.train_annotations"):
        semantic(tiny(), other, SemanticConfig(**SHORT, train_annotations=file), PLACE)
    for wrong in ({"scale": (2.0, 0.5)}, {"drops": (0.9, 0.7)}, {"drops": (1.5,)}, {"batch_size": 1, "crop": 32}):
        with pytest.raises(ValueError, match=r"smaller first|in order|batch norm"):
            SemanticConfig(**wrong)


def test_an_image_that_is_ignored_everywhere_has_no_loss(tmp_path: Path) -> None:
    everything = {"category_id": 10, "iscrowd": 1, "segmentation": {"size": [56, 64], "counts": [0, 56 * 64]}}
    root = write_coco(tmp_path, {"train2017": [1]}, extra={1: [everything]})
    source = open_segmentation(DataConfig(name="images", root=root), "train")
    labels = torch.full((1, 40, 40), 255)
    segmenter = build_segmenter(tiny(), 4)
    loss = module._loss(segmenter, source[0].image[None, :, :40, :40], labels)
    assert loss.item() == 0.0
    loss.backward()


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA, a folder with coco128, is not set")
def test_real_photographs() -> None:
    root = Path(os.environ["MVMR_TEST_DATA"]) / "coco128"
    file = root / "annotations/instances_train2017.json"
    source = open_segmentation(DataConfig(name="images", root=root), "train", annotations=file)
    config = SemanticConfig(**{**SHORT, "short_side": 48, "iterations": 4})
    segmenter, losses = train_segmenter(tiny(), source, config, PLACE)
    assert torch.isfinite(losses).all()
    with torch.no_grad():
        assert segmenter(source[0].image[None, :, ::8, ::8]).shape == (1, 81, 60, 80)


@pytest.mark.gpu
def test_on_a_gpu(data: DataConfig) -> None:
    found = semantic(tiny(), data, SemanticConfig(**SHORT), Workplace(torch.device("cuda")))
    assert 0 <= found["miou"] <= 100
    assert found["loss_last"] < 3
