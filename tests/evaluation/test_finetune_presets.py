"""The presets of `finetune` have the published values, its steps are the usual ones, and a stop changes nothing."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.data.images import ImageSource, subset
from mvmr.data.label_subsets import stratified
from mvmr.data.loading import Loader
from mvmr.data.sources import DataConfig, open_source
from mvmr.data.views import ViewMaker
from mvmr.evaluation import Workplace
from mvmr.evaluation.finetune import FinetuneConfig, finetune, new_head
from mvmr.evaluation.finetune_config import FINETUNE_PRESETS
from mvmr.evaluation.head import load_head
from mvmr.evaluation.resume import FILE, Resumable, forget
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, load_encoder, random_encoder

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"fraction": 0.1, "epochs": 2, "batch_size": 32, "encoder_lr": 1e-2}
"""Eight steps."""


def digits(split: str) -> ImageSource:
    return open_source(DataConfig(name="digits"), split, size=16)


def tiny() -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(name="resnet18", stem="mvmr", width=0.125, zero_init_residual=False), dim=64,
        image_size=16, mean=(0.3,) * 3, std=(0.4,) * 3, method="mvmr", data="digits", version="0",
    )  # fmt: skip
    return Encoder(random_encoder(card, seed=0).backbone, card).eval()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


# Rates of encoder and head at step k of epoch e with ten steps an epoch, from the papers and the released codes.
STEPS = {0: 1.0, 11: 1.0, 12: 0.2, 15: 0.2, 16: 0.04, 19: 0.04}
RATES = {
    "swav_1": lambda e, k: (0.02 * STEPS[e], 5.0 * STEPS[e]),
    "swav_10": lambda e, k: (0.01 * STEPS[e], 0.2 * STEPS[e]),
    "barlow_twins_1": lambda e, k: (0.002 * STEPS[e], 0.5 * STEPS[e]),
    "barlow_twins_10": lambda e, k: (0.002 * STEPS[e], 0.5 * STEPS[e]),
    "vicreg_1": lambda e, k: (0.03 * half_cosine(e / 20), 0.08 * half_cosine(e / 20)),
    "vicreg_10": lambda e, k: (0.01 * half_cosine(e / 20), 0.1 * half_cosine(e / 20)),
    "simclr_1": lambda e, k: (0.8 * half_cosine((e + k / 10) / 60),) * 2,
    "simclr_10": lambda e, k: (0.8 * half_cosine((e + k / 10) / 30),) * 2,
    "mvmr": lambda e, k: (1e-4 * half_cosine((e + k / 10) / 100),) * 2,
}


@pytest.mark.parametrize("preset", sorted(FINETUNE_PRESETS))
def test_a_presets_rates_are_the_published_ones(preset: str) -> None:
    config = FinetuneConfig.model_validate({"preset": preset})
    curve, scale = config.curve(), config.rate_scale(config.batch_size)
    for epoch in STEPS:
        for k in (0, 5, 9):
            at = scale * curve.at(10 * epoch + k, 10)
            rates = config.encoder_lr * at, (config.head_lr or config.encoder_lr) * at
            assert rates == pytest.approx(RATES[preset](epoch, k), rel=1e-12)


def test_a_presets_other_values_are_the_published_ones() -> None:
    starts = {"swav": "uniform", "barlow_twins": "normal", "vicreg": "normal", "simclr": "zeros"}
    for preset in FINETUNE_PRESETS:
        config = FinetuneConfig.model_validate({"preset": preset})
        if preset == "mvmr":
            assert config == FinetuneConfig()
            continue
        assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 0.0)
        assert config.fraction == (0.1 if preset.endswith("_10") else 0.01)
        assert config.nesterov is preset.startswith("simclr")
        assert config.batch_size == (4096 if preset.startswith("simclr") else 256)
        assert config.head_init == starts[preset.rpartition("_")[0]]
    assert [FinetuneConfig.model_validate({"preset": f"simclr_{n}"}).epochs for n in (1, 10)] == [60, 30]


def test_settings_lie_over_the_preset(tmp_path: Path) -> None:
    config = FinetuneConfig(preset="swav_1", epochs=5, milestones=(3, 4))
    assert (config.encoder_lr, config.head_lr, config.epochs, config.milestones) == (0.02, 5.0, 5, (3.0, 4.0))
    for way in ({"subset_list": tmp_path / "1percent.txt"}, {"labels_per_class": 3}):
        other = FinetuneConfig.model_validate({"preset": "swav_1", **way})
        assert (other.fraction, other.head_lr) == (None, 5.0)
    assert FinetuneConfig(preset="swav_1", fraction=0.05).fraction == 0.05
    assert FinetuneConfig(preset="swav_1", fraction=None).fraction is None
    # What means nothing under another schedule or optimiser goes with the preset's.
    assert FinetuneConfig(preset="swav_1", schedule="cosine").milestones == ()
    assert FinetuneConfig(preset="simclr_1", optimizer="adam").nesterov is False
    for preset in FINETUNE_PRESETS:
        chosen = FinetuneConfig.model_validate({"preset": preset, "seed": 2})
        assert FinetuneConfig.model_validate(chosen.model_dump(mode="json")) == chosen


def test_steps_are_the_loop_that_one_would_write(tmp_path: Path) -> None:
    """PyTorch's own SGD and MultiStepLR, from a head drawn as its linear layers are."""
    encoder, few = tiny(), subset(digits("train"), stratified(digits("train").labels, 0.05, seed=3))
    config = FinetuneConfig(
        preset="swav_1",
        fraction=0.05,
        seed=3,
        epochs=3,
        batch_size=16,
        milestones=(1, 2),
        encoder_lr=1e-3,
        head_lr=1e-2,
    )
    finetune(encoder, digits("train"), digits("test"), config, Workplace(CPU, out=tmp_path))
    net = copy.deepcopy(encoder.backbone).train().to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    layer = nn.Linear(64, 10)
    views = ViewMaker(config.view_settings(16), mean=(0.3,) * 3, std=(0.4,) * 3, seed=3)
    loader = Loader(few, batch_size=16, seed=3)
    groups = [{"params": net.parameters(), "lr": 1e-3}, {"params": layer.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.2)
    for epoch in range(3):
        for batch in loader:
            images = views(batch.images, batch.index, epoch)["global"][0]
            scores = layer(net(images.contiguous(memory_format=torch.channels_last)))
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, few.labels[batch.index]).backward()
            optimizer.step()
        schedule.step()
    saved = load_head(tmp_path)
    torch.testing.assert_close(saved.weight, layer.weight.detach(), rtol=1e-3, atol=1e-5)
    weights = state(load_encoder(tmp_path).backbone)
    for name, value in state(net).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_how_the_head_starts() -> None:
    zeros, normal, uniform = (
        new_head(400, 50, FinetuneConfig.model_validate({"head_init": way})) for way in ("zeros", "normal", "uniform")
    )
    assert zeros.weight.abs().sum() == zeros.bias.abs().sum() == normal.bias.abs().sum() == 0
    assert normal.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert 0.049 < uniform.weight.abs().max() < 0.05  # 1 / sqrt(400)
    assert uniform.bias.abs().max() > 0.04


class Killed(Exception):
    pass


def dropping() -> Encoder:
    """A net with batch norm that draws while it trains."""
    encoder = tiny()
    encoder.backbone.layer4.append(nn.Dropout(0.3))
    return encoder


@pytest.mark.parametrize(("stop", "optimizer"), [(1, "adam"), (4, "adamw"), (6, "sgd"), (8, "sgd")])
def test_a_killed_training_ends_with_the_same_bits(
    stop: int, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Resumable.__init__.__kwdefaults__, "every_seconds", 0.0)  # type: ignore[arg-type]
    settings = {**SHORT, "layer_decay": None, "optimizer": optimizer, "warmup_epochs": 0.5}
    config, test = FinetuneConfig.model_validate(settings), digits("test").take(torch.arange(50))

    def killing(what: str, done: int, total: int) -> None:
        if done == stop:
            raise Killed

    def run(out: str, config: FinetuneConfig, progress: Any = None) -> dict[str, float]:
        return finetune(
            dropping(), digits("train"), test, config, Workplace(CPU, out=tmp_path / out, progress=progress)
        )

    with pytest.raises(Killed):
        run("parts", config, killing)
    assert (tmp_path / "parts" / FILE).is_file()
    torch.manual_seed(5)  # another process has other generators
    steps: list[int] = []
    assert run("parts", config, lambda what, done, total: steps.append(done)) == run("whole", config)
    assert steps == list(range(stop + 1, 9))
    for name in ("encoder.safetensors", "head.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    forget(tmp_path / "parts")
    if stop == 4:  # other settings begin anew
        with pytest.raises(Killed):
            run("parts", config, killing)
        steps.clear()
        run("parts", config.model_copy(update={"seed": 1}), lambda what, done, total: steps.append(done))
        assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": (3,)}, "milestones have no effect with schedule=cosine"),
        ({"preset": "swav"}, "Input should be 'mvmr', 'swav_1'"),
        ({"preset": "swav_1", "fraction": 0.01, "labels_per_class": 3}, "fraction and labels_per_class are set"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.model_validate(settings)
