"""Linear evaluation on augmented images is the loop that one would write, and the same after a stop."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evaluation.short_probing import CPU, SHORT, array, digits, few, tiny
from mvmr.data.images import ArraySource
from mvmr.data.loading import Loader
from mvmr.data.view_recipes import view_settings
from mvmr.data.views import Crop, View, ViewMaker, Views
from mvmr.evaluation import Workplace
from mvmr.evaluation.features import features_of
from mvmr.evaluation.head import HeadConfig, head, load_head
from mvmr.evaluation.image_training import view_of
from mvmr.evaluation.linear_images import linear_by_preset, linear_images, new_layer
from mvmr.evaluation.linear_presets import LinearPresetConfig
from mvmr.evaluation.resume import FILE, Resumable, forget
from mvmr.types import RunError, UserError

# What is computed


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1, "seed": 3},
        {"preset": "byol", "batch_size": 24, "lr": 2.0, "flip": False},
        {"preset": "moco", "lr": 0.3, "milestones": [1], "factor": 0.5},
    ],
)
def test_it_is_the_loop_that_one_would_write(changes: dict[str, Any], tmp_path: Path) -> None:
    """The layer of PyTorch's own SGD and schedules over the same batches, its encoder in eval mode."""
    config = LinearPresetConfig.model_validate({**SHORT, **changes})
    encoder, few_images = tiny(), few("train", 100)
    place = Workplace(CPU.device, out=tmp_path)
    without = LinearPresetConfig.model_validate({**config.model_dump(), "labels_per_class": None})
    linear_images(copy.deepcopy(encoder).train(), few_images, few(), without, place)
    layer = nn.Linear(32, 10)
    nn.init.zeros_(layer.bias)
    nn.init.zeros_(layer.weight)
    if config.preset != "byol":
        nn.init.normal_(layer.weight, 0.0, 0.01, generator=torch.Generator().manual_seed(config.seed))
    rate = 2.0 * 24 / 256 if config.preset == "byol" else 0.3
    optimizer = torch.optim.SGD(
        layer.parameters(), rate, 0.9, nesterov=config.preset == "byol", weight_decay=config.weight_decay
    )
    loader = Loader(few_images, batch_size=config.batch_size, seed=config.seed)
    views = ViewMaker(
        Views(recipe="mvmr", size=16, crops={"augmented": View(
            crop=Crop(interpolation=config.interpolation), flip=0.5 if config.flip else 0.0)}),
        mean=(0.3,) * 3, std=(0.4,) * 3, seed=config.seed,
    )  # fmt: skip
    schedules: dict[str, Any] = {
        "swav": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2),
        "byol": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * len(loader)),
        "moco": torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.5),
    }
    for epoch in range(2):
        for batch in loader:
            with torch.no_grad():
                images = views(batch.images, batch.index, epoch)["global"][0]
                features = encoder.backbone(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(layer(features), few_images.labels[batch.index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if config.preset == "byol":
                schedules["byol"].step()
        if config.preset != "byol":
            schedules[config.preset].step()
    saved = load_head(tmp_path)
    torch.testing.assert_close(saved.weight, layer.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saved.bias, layer.bias.detach(), rtol=1e-4, atol=1e-6)


def test_the_encoder_stays_as_it_is(tmp_path: Path) -> None:
    encoder = tiny()
    encoder.backbone.layer1.train()  # a mode of its own, to be found again
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    flags, random_state = [part.training for part in encoder.modules()], torch.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    place = Workplace(CPU.device, out=tmp_path, progress=lambda *report: seen.append(report))
    config = LinearPresetConfig.model_validate(SHORT)
    metrics = linear_images(encoder, digits("train"), few(), config, place)
    assert metrics.keys() == {"top1", "top5", "n_train"}
    assert metrics["n_train"] == 100
    assert metrics.outcomes["top1"].shape == (60,)
    after = encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [part.training for part in encoder.modules()] == flags
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert seen == [("linear", step, 6) for step in range(1, 7)]
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
    # Digits are already of the encoder's size, so that the saved head sees the same features.
    test = features_of(encoder, few())
    assert head(test, test, HeadConfig(folder=tmp_path))["top1"] == metrics["top1"]
    assert linear_images(encoder, digits("train"), few(), config, CPU) == metrics
    assert linear_by_preset(encoder, digits("train"), few(), config, CPU) == metrics


def test_a_crop_is_a_function_of_seed_epoch_and_image() -> None:
    source, found = few(count=24), {}
    for batch_size in (4, 12):
        settings = LinearPresetConfig.model_validate({"preset": "moco"}).view_settings(16)
        maker = ViewMaker(settings, mean=(0.0,) * 3, std=(1.0,) * 3, seed=5)
        loader = Loader(source, batch_size=batch_size, seed=batch_size)  # another order too
        views = torch.zeros(2, 24, 3, 16, 16)
        for epoch in range(2):
            for batch in loader:
                views[epoch, batch.index] = view_of(maker, batch, CPU.device)
        found[batch_size] = views
    assert torch.equal(found[4], found[12])
    assert not torch.equal(found[4][0], found[4][1])
    ((_, view),) = LinearPresetConfig.model_validate({"preset": "moco"}).view_settings(224).crops.items()
    assert (view.flip, view.jitter, view.gray, view.blur, view.solarise, view.count) == (0.5, None, 0.0, None, None, 1)
    assert view.crop == Crop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bilinear")
    assert view_settings("mvmr", size=224).crops["augmented"].crop == view.crop


def test_what_is_separable_is_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    images = torch.randint(0, 80, (80, 3, 16, 16), generator=generator)
    images[torch.arange(80), 2 * y] += 150  # red or blue
    source = ArraySource(images.to(torch.uint8), y, name="own/train", classes=("red", "blue"))
    config = LinearPresetConfig.model_validate({"preset": "swav", "epochs": 10, "batch_size": 16})
    train, test = source.take(torch.arange(60)), source.take(torch.arange(60, 80))
    assert linear_images(tiny(), train, test, config, CPU) == {"top1": 100.0, "n_train": 60.0}


# Taken up again


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_killed_training_ends_with_the_same_bits(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Resumable.__init__.__kwdefaults__, "every_seconds", 0.0)  # type: ignore[arg-type]
    config = LinearPresetConfig.model_validate({**SHORT, "nesterov": True})
    whole, parts, steps = tmp_path / "whole", tmp_path / "parts", []
    expected = linear_images(tiny(), digits("train"), few(), config, Workplace(CPU.device, out=whole))

    def killing(what: str, done: int, total: int) -> None:
        if done == stop:
            raise Killed

    with pytest.raises(Killed):
        linear_images(tiny(), digits("train"), few(), config, Workplace(CPU.device, out=parts, progress=killing))
    assert (parts / FILE).is_file()
    other = LinearPresetConfig.model_validate({**SHORT, "nesterov": True, "seed": 1})
    going = Workplace(CPU.device, out=parts, progress=lambda what, done, total: steps.append(done))
    assert linear_images(tiny(), digits("train"), few(), config, going) == expected
    assert steps == list(range(stop + 1, 7))
    assert (whole / "head.safetensors").read_bytes() == (parts / "head.safetensors").read_bytes()
    steps.clear()  # the last state stays until the result is written, and needs no further step
    assert linear_images(tiny(), digits("train"), few(), config, going) == expected
    assert steps == []
    forget(parts)
    with pytest.raises(Killed):
        linear_images(tiny(), digits("train"), few(), config, Workplace(CPU.device, out=parts, progress=killing))
    steps.clear()  # other settings, and another encoder, begin anew
    linear_images(tiny(), digits("train"), few(), other, going)
    assert steps == list(range(1, 7))


# What is refused


def test_labels_that_cannot_be_trained_on() -> None:
    good, config = array(torch.tensor([0, 1, 0, 1]), ("a", "b")), LinearPresetConfig.model_validate(SHORT)
    for train, message in [
        (array(None), "the train split has no labels, and linear needs them"),
        (array(torch.tensor([0, 1, 0, -1])), "train split has images without label"),
        (array(torch.zeros(4, 2, dtype=torch.int8), ("a", "b")), "linear is for one label an image; own/train has"),
        (array(torch.tensor([0, 1, 0, 1]), ("a", "c")), "different classes"),
        (good, "labels_per_class=10, but class a has 2 training images"),
    ]:
        with pytest.raises(UserError, match=message):
            linear_images(tiny(), train, good, config, CPU)
    with pytest.raises(UserError, match=r"linear\.preset=mvmr trains on cached features"):
        linear_images(tiny(), good, good, LinearPresetConfig(), CPU)


def test_a_batch_larger_than_the_data_and_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    broken, config = tiny(), LinearPresetConfig.model_validate({"preset": "moco", "epochs": 1})
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    place = Workplace(CPU.device, out=tmp_path)
    with (
        pytest.warns(UserWarning, match=r"linear\.batch_size is 256, and there are 20 images"),
        pytest.raises(RunError, match=r"the loss is nan in epoch 1; lower linear\.lr"),
    ):
        linear_images(broken, few("train", 20), few(count=10), config, place)
    assert list(tmp_path.iterdir()) == []


def test_the_start() -> None:
    config = LinearPresetConfig.model_validate({"preset": "moco"})
    layer = new_layer(2000, 50, config)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert layer.bias.abs().sum() == 0
    torch.manual_seed(8)
    assert torch.equal(copy.deepcopy(layer).weight, new_layer(2000, 50, config).weight)
    assert new_layer(20, 5, LinearPresetConfig.model_validate({"preset": "simclr"})).weight.abs().sum() == 0


@pytest.mark.gpu
def test_on_a_gpu_in_half_precision() -> None:
    config = LinearPresetConfig.model_validate({**SHORT, "half": True, "epochs": 6})
    metrics = linear_images(tiny(), digits("train"), few(), config, Workplace(torch.device("cuda")))
    assert metrics["top1"] > 20
