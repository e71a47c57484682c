"""The presets of `linear` have the published rates and values, and what is given lies over them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mvmr.evaluation.linear import LinearConfig, linear
from mvmr.evaluation.linear_images import linear_by_preset
from mvmr.evaluation.linear_presets import LINEAR_PRESETS, LinearPresetConfig, works_on
from mvmr.types import Features


def half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


# The rate at step k of epoch e, with ten steps an epoch, from the papers and the released codes.
RATES = {
    "moco": lambda e, k: 30.0 if e < 60 else 3.0 if e < 80 else 0.3,
    "moco_v3": lambda e, k: 0.1 * 4 * half_cosine(e / 90),
    "swav": lambda e, k: 0.3 * half_cosine(e / 100),
    "dino": lambda e, k: 0.001 * 4 * half_cosine(e / 100),
    "simclr": lambda e, k: 1.6 * half_cosine((e + k / 10) / 90),
    "byol": lambda e, k: 0.2 * 4 * half_cosine((e + k / 10) / 80),
    "barlow_twins": lambda e, k: 0.3 * half_cosine(e / 100),
    "vicreg": lambda e, k: 0.02 * half_cosine(e / 100),
}


@pytest.mark.parametrize("preset", sorted(set(LINEAR_PRESETS) - {"mvmr"}))
def test_rates_are_the_published_ones(preset: str) -> None:
    config = LinearPresetConfig.model_validate({"preset": preset})
    curve, peak = config.curve(), config.peak(config.batch_size)
    for step in (0, 1, 9, 10, 399, 400, 599, 600, 605, 799):
        assert peak * curve.at(step, 10) == pytest.approx(RATES[preset](*divmod(step, 10)), rel=1e-12)
    last = config.epochs * 10 - 1
    assert peak * curve.at(last, 10) == pytest.approx(RATES[preset](*divmod(last, 10)), rel=1e-9)
    assert peak * curve.at(last, 10) > 0


def test_other_values_are_the_published_ones() -> None:
    published = {  # batch, epochs, weight decay, Nesterov
        "moco": (256, 100, 0.0, False),
        "moco_v3": (1024, 90, 0.0, False),
        "swav": (256, 100, 1e-6, False),
        "dino": (1024, 100, 0.0, False),
        "simclr": (4096, 90, 0.0, True),
        "byol": (1024, 80, 0.0, True),
        "barlow_twins": (256, 100, 1e-6, False),
        "vicreg": (256, 100, 1e-6, False),
    }
    assert {*published, "mvmr"} == set(LINEAR_PRESETS)
    for preset, values in published.items():
        config = LinearPresetConfig.model_validate({"preset": preset})
        assert (config.batch_size, config.epochs, config.weight_decay, config.nesterov) == values
        assert config.momentum == 0.9
        assert config.start == ("zeros" if preset in ("simclr", "byol") else "normal")
        assert config.features == ("last_blocks" if preset == "dino" else "output")
        assert config.interpolation == ("bicubic" if preset in ("simclr", "byol") else "bilinear")
        assert works_on(config) == "images"


def test_settings_lie_over_the_preset() -> None:
    config = LinearPresetConfig.model_validate({"preset": "moco", "lr": 0.5, "milestones": [3]})
    assert (config.lr, config.milestones, config.factor, config.epochs) == (0.5, (3.0,), 0.1, 100)
    smooth = LinearPresetConfig.model_validate({"preset": "moco", "schedule": "cosine", "epochs": 10})
    assert (smooth.lr, smooth.milestones, smooth.curve().at(50, 10)) == (30.0, (), pytest.approx(0.5))
    for preset in LINEAR_PRESETS:
        chosen = LinearPresetConfig.model_validate({"preset": preset, "seed": 4})
        assert LinearPresetConfig.model_validate(chosen.model_dump(mode="json")) == chosen
    scaled = LinearPresetConfig.model_validate({"preset": "dino"})
    assert (scaled.peak(64), LinearPresetConfig.model_validate({"preset": "moco"}).peak(64)) == (0.00025, 30.0)


def test_the_default_is_the_layer_on_cached_features() -> None:
    config = LinearPresetConfig()
    assert works_on(config) == "features"
    assert config.cached() == LinearConfig()
    assert config.model_dump() == {"preset": "mvmr", **LinearConfig().model_dump()}
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 4
    train = Features(torch.eye(4)[y] + 0.1 * torch.randn(40, 4, generator=generator), y)
    changed = LinearPresetConfig(lr=0.1, epochs=5, batch_size=8, labels_per_class=9, seed=2)
    found = linear_by_preset(train, train, changed)
    assert found == linear(train, train, LinearConfig(lr=0.1, epochs=5, batch_size=8, labels_per_class=9, seed=2))
    assert found.outcomes["top1"].shape == (40,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nesterov": True}, "nesterov: no effect with preset=mvmr; leave out, or take another preset"),
        ({"preset": "mocoo"}, "Input should be 'mvmr', 'moco'"),
        ({"preset": ["moco"]}, "Input should be 'mvmr', 'moco'"),
        ({"preset": "swav", "milestones": [2]}, "milestones have no effect with schedule=cosine"),
        ({"preset": "byol", "momentum": 0.0}, "nesterov needs a momentum"),
        ({"preset": "swav", "blocks": 2}, "no effect with features=output"),
        ({"preset": "swav", "crop": [0.5, 0.2]}, "crop must be two numbers"),
        ({"preset": "swav", "rate": 1}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        LinearPresetConfig.model_validate(settings)
    assert len(caught.value.errors()) == 1
