"""Settings of detectors: order, rates and optimiser as they are said, and what has no effect is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvmr.evaluation.detection import DetectionConfig
from mvmr.evaluation.detector_batches import StepImages, step_images
from mvmr.evaluation.detector_training import _built, _optimizer, _rate
from mvmr.evaluation.instance import InstanceConfig
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import random_encoder
from states import state

NARROW = {"levels": (2, 3, 4), "pyramid_width": 16, "hidden": 8}


def tiny() -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(width=0.125, stem="cifar"), dim=64, image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3,
        method="mvmr", data="digits", version="0",
    )  # fmt: skip
    return random_encoder(card, seed=0)


def test_order_flips_and_rates() -> None:
    config = DetectionConfig(iterations=24_000)
    usable = [5, 6, 7, 8, 9, 11]
    places = [pair for step in range(4) for pair in step_images(usable, step, batch_size=16, flip=True, seed=0)]
    for epoch in range(10):
        assert sorted(position for position, _ in places[6 * epoch : 6 * epoch + 6]) == usable
    assert {flip for _, flip in places} == {True, False}
    assert places[:6] != places[6:12]
    assert step_images(usable, 12, batch_size=4, flip=True, seed=0) == places[48:52]
    lazy = StepImages(usable, range(1, 4), batch_size=16, flip=True, seed=0)
    assert [pair for step in lazy for pair in step] == places[16:]
    assert (len(lazy), lazy[-1]) == (3, places[48:])
    assert step_images(usable, 0, batch_size=16, flip=True, seed=1) != places[:16]
    straight = [pair for step in range(4) for pair in step_images(usable, step, batch_size=16, flip=False, seed=0)]
    assert straight == [(position, False) for position, _ in places]
    rates = [_rate(config, step) for step in (0, 100, 17_999, 18_000, 21_999, 22_000, 23_999)]
    assert rates == pytest.approx([2e-5, 0.02, 0.02, 2e-3, 2e-3, 2e-4, 2e-4])
    assert _rate(config.model_copy(update={"batch_size": 4}), 100) == pytest.approx(0.005)
    assert _rate(InstanceConfig(), 60_000) == pytest.approx(2e-3)
    assert _rate(InstanceConfig(), 80_000) == pytest.approx(2e-4)


def test_what_has_no_effect_is_said() -> None:
    with pytest.warns(UserWarning, match="hidden, levels: without effect with head=c4"):
        DetectionConfig(hidden=32, levels=(2, 3))
    with pytest.warns(UserWarning, match=r"detection\.mask_layers: without effect"):
        DetectionConfig(head="fpn", mask_layers=(8,))


def test_weight_decay_spares_norms_and_momentum_is_sgds() -> None:
    """Without a loss only the decay moves a weight: the second step of SGD with momentum, by hand."""
    config = DetectionConfig(head="fpn", weight_decay=0.1, momentum=0.5, **NARROW)
    detector, _ = _built(tiny(), config, 2, False, "detection")
    optimizer, before = _optimizer(detector, config), state(detector)
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    for _ in range(2):
        for parameter in detector.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    norms = {f"{name}.{own}" for name, part in detector.named_modules() if isinstance(part, nn.BatchNorm2d)
             for own in ("weight", "bias")}  # fmt: skip
    assert len(norms) > 20
    for name, parameter in detector.named_parameters():
        # v = 0.1 w, w' = w - 0.2 v; v' = 0.5 v + 0.1 w', w'' = w' - 0.2 v'
        factor = 1.0 if name in norms else 0.98 - 0.2 * (0.5 * 0.1 + 0.1 * 0.98)
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)
