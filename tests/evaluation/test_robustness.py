"""A probe on clean features, judged on corrupted images: against scikit-learn and a plain loop."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from mvmr.data.images import ArraySource
from mvmr.evaluation import robustness as module
from mvmr.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mvmr.evaluation.features import features_of
from mvmr.evaluation.linear import LinearFastConfig, linear_fast
from mvmr.evaluation.robustness import RobustnessConfig, outcomes, robustness, summary
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.types import RunError, UserError

CPU = Workplace(torch.device("cpu"))
SIDE = 16


def encoder_of(backbone: nn.Module, dim: int) -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(), dim=dim, image_size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3, method="none", data="none",
        version="0",
    )  # fmt: skip
    return Encoder(backbone, card)


def pixels() -> Encoder:
    return encoder_of(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), 3 * (SIDE // 2) ** 2)


def stripes(count: int, seed: int) -> ArraySource:
    """Four classes: stripes in two directions, fine and coarse, faint and in noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    place = torch.arange(SIDE)
    fine, coarse = ((place // width) % 2 for width in (2, 4))
    rows = torch.stack([each[:, None].expand(SIDE, SIDE) for each in (fine, coarse)])
    patterns = torch.cat([rows, rows.transpose(1, 2)]).float()  # [4, S, S]
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    images = 128 + 10 * (patterns[y][:, None] - 0.5) + 30 * noise
    return ArraySource(images.clamp(0, 255).to(torch.uint8), y, name=f"stripes/{seed}", classes=("a", "b", "c", "d"))


def test_accuracies_of_the_clean_probe_on_corrupted_images() -> None:
    encoder, train, test = pixels(), stripes(160, 0), stripes(90, 1)
    config = RobustnessConfig(levels="imagenet", severities=(2, 5), seed=3, l2=10.0)
    seen: list[tuple[str, int, int]] = []
    place = Workplace(CPU.device, progress=lambda *report: seen.append(report))
    metrics = robustness(encoder, train, test, config, place)
    assert seen == [("features of stripes/0", 160, 160), ("corrupted images of stripes/1", 90, 90)]
    clean = features_of(encoder, train), features_of(encoder, test)
    assert metrics["top1"] == linear_fast(*clean, LinearFastConfig(l2=10.0))["top1"]
    assert metrics["n_train"] == 160
    x = clean[0].x.double().numpy()
    shift, scale = x.mean(0), x.std(0)
    probe = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000).fit((x - shift) / scale, train.labels)
    single = []
    for name in CORRUPTIONS:
        of_kind = []
        for severity in (2, 5):
            changed = corrupt(test.images, torch.arange(90), name, severity, seed=3, levels="imagenet")
            features = encoder(changed).double().numpy()
            found = 100 * np.mean(probe.predict((features - shift) / scale) == test.labels.numpy())
            assert metrics[f"top1/{name}/{severity}"] == pytest.approx(found, abs=1.2)  # one image may lie at a border
            of_kind.append(metrics[f"top1/{name}/{severity}"])
        assert metrics[f"top1/{name}"] == pytest.approx(sum(of_kind) / 2)
        single += of_kind
    assert metrics["corrupted"] == pytest.approx(sum(single) / 8)
    assert metrics["relative_drop"] == pytest.approx(100 * (1 - sum(single) / 8 / metrics["top1"]))
    assert len(metrics) == 4 + 4 + 8


def test_noise_and_blur_harm_more_the_stronger_they_are() -> None:
    encoder, train, test = pixels(), stripes(400, 0), stripes(400, 1)
    config = RobustnessConfig(corruptions=("gaussian_noise", "gaussian_blur"), levels="imagenet")
    metrics = robustness(encoder, train, test, config, CPU)
    assert metrics["top1"] > 80
    for name in config.corruptions:
        falling = [metrics["top1"], *(metrics[f"top1/{name}/{severity}"] for severity in SEVERITIES)]
        assert all(after <= before + 1.5 for before, after in pairwise(falling)), falling
        assert falling[-1] < 60, falling
    assert 0 < metrics["relative_drop"] < 100


def test_outcomes_are_of_each_image_and_on_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, train, test = pixels(), stripes(80, 0), stripes(50, 1)
    config = RobustnessConfig(severities=(5, 1, 5))
    assert config.severities == (5, 1)
    right = outcomes(encoder, train, test, config, CPU)
    assert list(right)[:3] == ["clean", "gaussian_noise/5", "gaussian_noise/1"]
    assert len(right) == 9
    assert all(each.shape == (50,) and each.dtype == torch.bool for each in right.values())
    assert 0 < sum(int(each.sum()) for each in right.values()) < 9 * 50
    monkeypatch.setattr(module, "BATCH", 7)
    again = outcomes(encoder, train, test, config, CPU)
    assert all(torch.equal(again[case], each) for case, each in right.items())
    other = outcomes(encoder, train, test, config.model_copy(update={"seed": 1}), CPU)
    assert not torch.equal(other["gaussian_noise/5"], right["gaussian_noise/5"])
    assert all(torch.equal(other[case], each) for case, each in right.items() if not case.startswith("gaussian_noise"))
    assert summary(right)["top1/jpeg/5"] == pytest.approx(100 * right["jpeg/5"].double().mean().item())


def test_summary_by_hand() -> None:
    def share(count: int) -> Tensor:
        return torch.arange(10) < count

    found = summary({"clean": share(8), "jpeg/1": share(6), "jpeg/5": share(2), "brightness/1": share(8)})
    assert found == pytest.approx(
        {
            "top1": 80.0, "corrupted": 60.0, "relative_drop": 25.0, "top1/jpeg": 40.0, "top1/brightness": 80.0,
            "top1/jpeg/1": 60.0, "top1/jpeg/5": 20.0, "top1/brightness/1": 80.0,
        }
    )  # fmt: skip
    assert summary({"clean": share(0), "jpeg/1": share(0)})["relative_drop"] == 0.0


def test_the_encoder_stays_as_it_is() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = encoder_of(backbone.train(), 4)
    before = copy.deepcopy(encoder.state_dict())
    config = RobustnessConfig(corruptions=("jpeg",), severities=(1,))
    robustness(encoder, stripes(20, 0), stripes(10, 1), config, CPU)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_what_is_refused() -> None:
    encoder, train, test = pixels(), stripes(20, 0), stripes(10, 1)
    unlabelled = ArraySource(test.images, None, name="x/test")
    with pytest.raises(UserError, match="test split has no labels"):
        robustness(encoder, train, unlabelled, RobustnessConfig(), CPU)
    other = ArraySource(test.images, test.labels, name="x/test", classes=("a", "b", "c", "e"))
    with pytest.raises(UserError, match="different classes"):
        robustness(encoder, train, other, RobustnessConfig(), CPU)
    with pytest.raises(ValueError, match=r"no corruption 'jpg' \(did you mean jpeg"):
        RobustnessConfig(corruptions=("jpg",))
    with pytest.raises(ValueError, match=r"severities are 1 to 5, not \[0, 1\]"):
        RobustnessConfig(severities=(0, 1))

    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax() > 1.5, torch.nan, x.flatten(1))

    dark = ArraySource(test.images // 2, test.labels, name="dark/test", classes=test.classes)
    bright = RobustnessConfig(corruptions=("brightness",), levels="imagenet")
    with pytest.raises(RunError, match=r"features of dark/test, brightness/\d, are not finite"):
        robustness(encoder_of(Fragile(), 3 * SIDE**2), dark, dark, bright, CPU)
