"""Parameters follow the distributions of torchvision's transforms, and depend on their own image alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision import transforms

from mvmr.data import view_parameters as parameters
from mvmr.data.view_recipes import Blur, Crop, Jitter, PadCrop

N = 20_000
LEVEL = 1e-4  # of every test here; the numbers are fixed, so that none fails by chance


@pytest.fixture(scope="module")
def draws() -> Tensor:
    return parameters.view_draws(7, 1, torch.arange(N), 1)[0]  # [N, draws]


@pytest.mark.parametrize(
    ("crop", "height", "width"),
    [
        (Crop(), 32, 32),
        (Crop(scale=(0.2, 1.0)), 96, 96),
        (Crop(scale=(0.05, 0.14), ratio=(0.5, 2.0)), 60, 100),
        (Crop(scale=(0.9, 1.0)), 50, 130),  # most attempts do not fit: the fallback is drawn too
    ],
)
def test_crops_follow_torchvision(draws, crop, height, width):
    ours = parameters.crop_boxes(crop, draws, height, width)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor(
        [transforms.RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(3000)]
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column].numpy(), theirs[:, column].numpy()).pvalue > LEVEL
    for function in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert stats.ks_2samp(function(ours).numpy(), function(theirs).numpy()).pvalue > LEVEL


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (40, 40, (0, 0, 40, 40))],
)
def test_crops_that_never_fit_are_central(height, width, expected):
    impossible = torch.full((3, 34), 0.999)  # the whole area at the greatest ratio
    boxes = parameters.crop_boxes(Crop(scale=(0.999, 1.0)), impossible, height, width)
    assert boxes.tolist() == [list(expected)] * 3


def test_crops_take_the_first_attempt_that_fits(draws):
    crop = Crop(scale=(0.5, 1.0), ratio=(0.5, 2.0))
    boxes = parameters.crop_boxes(crop, draws[:200], 40, 40).tolist()
    for row, (_, _, height, width) in zip(draws[:200].tolist(), boxes, strict=True):
        pairs = ((row[14 + 2 * k] * 0.5 + 0.5, 0.5 * 4 ** row[15 + 2 * k]) for k in range(10))
        sides = ((round((1600 * a / r) ** 0.5), round((1600 * a * r) ** 0.5)) for a, r in pairs)
        assert (height, width) == next(((h, w) for h, w in sides if h <= 40 and w <= 40), (40, 40))


def test_jitter_factors_are_uniform(draws):
    factors = parameters.jitter_factors(Jitter(brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2), draws)
    for column, (low, high) in zip(factors.T, [(0.2, 1.8), (0.6, 1.4), (0, 2.5), (-0.2, 0.2)], strict=True):
        assert stats.kstest(column.numpy(), stats.uniform(low, high - low).cdf).pvalue > LEVEL


def test_no_strength_means_no_change(draws):
    factors = parameters.jitter_factors(Jitter(), draws[:50])
    assert torch.equal(factors, torch.tensor([[1.0, 1, 1, 0]], dtype=torch.float64).expand(50, 4))


def test_orders_turns_and_offsets_are_uniform(draws):
    offsets = parameters.pad_offsets(PadCrop(padding=4), draws)
    for values, count in [
        (parameters.jitter_orders(draws), 24),
        (parameters.quarter_turns(draws), 4),
        (offsets[:, 0], 9),
        (offsets[:, 1], 9),
        (offsets[:, 0] * 9 + offsets[:, 1], 81),
    ]:
        counts = torch.bincount(values, minlength=count)
        assert len(counts) == count
        assert stats.chisquare(counts.numpy()).pvalue > LEVEL


def test_sigmas_are_uniform(draws):
    sigmas = parameters.blur_sigmas(Blur(sigma=(0.1, 2.0)), draws)
    assert stats.kstest(sigmas.numpy(), stats.uniform(0.1, 1.9).cdf).pvalue > LEVEL


@pytest.mark.parametrize("operation", ["flip", "jitter", "gray", "blur", "solarise"])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_operations_happen_with_their_probability(draws, operation, probability):
    positions = parameters.chosen(draws, operation, probability)
    assert stats.binomtest(len(positions), N, probability).pvalue > LEVEL
    assert torch.equal(positions, positions.unique())


def test_parameters_are_independent(draws):
    jitter = Jitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5)
    boxes = parameters.crop_boxes(Crop(scale=(0.3, 0.3), ratio=(1.0, 1.0)), draws, 100, 100)[:, :2]
    columns = [boxes, parameters.jitter_factors(jitter, draws), parameters.blur_sigmas(Blur(), draws).unsqueeze(1)]
    columns += [parameters.quarter_turns(draws).unsqueeze(1), parameters.jitter_orders(draws).unsqueeze(1)]
    for operation in ("flip", "jitter", "gray", "blur", "solarise"):
        happens = torch.zeros(N, 1)
        happens[parameters.chosen(draws, operation, 0.5)] = 1
        columns.append(happens)
    together = torch.cat([c.double() for c in columns], 1)
    correlations = torch.corrcoef(together.T) - torch.eye(together.shape[1])
    assert correlations.abs().max() < 5 / N**0.5


def test_draws_depend_on_their_own_image_and_view_alone():
    index = torch.tensor([5, 900, 17])
    three = parameters.view_draws(1, 2, index, 3)
    assert torch.equal(parameters.view_draws(1, 2, index[[1]], 2), three[:2, [1]])
    for other in (parameters.view_draws(2, 2, index, 3), parameters.view_draws(1, 3, index, 3), three.flip(0)[:1]):
        assert not torch.isclose(other[0], three[0]).any()
