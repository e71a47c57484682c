"""CRD's loss over a memory bank against a slow loop, its limits, and where its gradient goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mvmr.losses.noise_contrastive import bank_logits, noise_contrastive, partition_estimate


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def positions(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_slow_loop(temperature: float) -> None:
    anchors, bank, index = unit(3, 4), unit(9, 4, seed=1), positions(3, 6, below=9)  # N = 9, K = 5
    z = torch.tensor(7.5, dtype=torch.float64)
    total = 0.0
    for b in range(3):
        for k in range(6):
            p = math.exp(sum(float(anchors[b, d] * bank[index[b, k], d]) for d in range(4)) / temperature) / 7.5
            share = p if k == 0 else 5 / 9
            total -= math.log(share / (p + 5 / 9 + 1e-7)) / 3
    logits = bank_logits(anchors, bank, index, temperature=temperature)
    assert noise_contrastive(logits, images=9, partition=z).item() == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize("count", [3, 40])
def test_logits_of_copied_rows_equal_those_of_all_products(count: int) -> None:
    """A bank of 16 rows of 4: three rows an anchor are copied, forty are looked up among all products."""
    anchors, bank, index = unit(5, 4), unit(16, 4, seed=1), positions(5, count, below=16)
    found = bank_logits(anchors, bank, index, temperature=0.5)
    for b in range(5):
        for k in range(count):
            expected = float((anchors[b] * bank[index[b, k]]).sum()) / 0.5
            assert found[b, k].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("images", [16, 17, 10_000])
def test_both_ways_to_the_logits_have_one_gradient(images: int) -> None:
    bank, index = unit(images, 4, seed=1), positions(3, 4, below=images)  # 4 x 4 = 16 numbers copied for an anchor
    anchors = unit(3, 4).requires_grad_()
    weights = unit(3, 4, seed=2)
    (bank_logits(anchors, bank, index, temperature=0.1) * weights).sum().backward()
    expected = torch.stack([(weights[b, :, None] * bank[index[b]]).sum(0) / 0.1 for b in range(3)])
    torch.testing.assert_close(anchors.grad, expected, rtol=1e-12, atol=1e-12)


def test_partition_is_the_number_of_images_times_the_mean() -> None:
    logits = unit(3, 6)
    expected = sum(math.exp(float(logits[b, k])) for b in range(3) for k in range(6)) / 18 * 50
    assert partition_estimate(logits, images=50).item() == pytest.approx(expected, abs=1e-10)


def test_the_estimate_over_the_whole_bank_normalises_the_probabilities() -> None:
    bank = unit(12, 4, seed=1)
    logits = bank_logits(unit(1, 4), bank, torch.arange(12)[None], temperature=0.3)
    z = partition_estimate(logits, images=12)
    assert (logits.exp() / z).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_guessing_costs_the_entropy_of_one_pair_among_k_and_one() -> None:
    """Where all p are 1 / N, each of K + 1 pairs is the image's own with chance 1 / (K + 1)."""
    own, k = 1000, 9
    logits = torch.zeros(4, 1 + k, dtype=torch.float64)
    found = noise_contrastive(logits, images=own, partition=torch.tensor(float(own), dtype=torch.float64)).item()
    expected = -math.log(1 / (k + 1)) - k * math.log(k / (k + 1))
    assert found == pytest.approx(expected, rel=1e-3)  # the denominators' 1e-7 beside p = 1e-3


def test_own_pair_near_and_others_far_costs_little() -> None:
    z = torch.tensor(100.0)
    good = torch.cat([torch.full((2, 1), 14.0), torch.full((2, 5), -14.0)], 1)
    assert noise_contrastive(good, images=100, partition=z).item() < 1e-3
    assert noise_contrastive(-good, images=100, partition=z).item() > 30


def test_order_of_the_negatives_does_not_matter() -> None:
    logits, z = unit(4, 8), torch.tensor(5.0, dtype=torch.float64)
    expected = noise_contrastive(logits, images=20, partition=z).item()
    turned = torch.cat([logits[:, :1], logits[:, 1:].flip(1)], 1)
    assert noise_contrastive(turned, images=20, partition=z).item() == pytest.approx(expected, abs=1e-12)
    assert abs(noise_contrastive(logits.flip(1), images=20, partition=z).item() - expected) > 1e-3


def test_gradient_reaches_the_anchors_alone() -> None:
    anchors, bank, index = unit(3, 4).requires_grad_(), unit(9, 4, seed=1).requires_grad_(), positions(3, 6, below=9)
    z = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(v: Tensor) -> Tensor:
        return noise_contrastive(bank_logits(v, bank, index, temperature=0.3), images=9, partition=z)

    assert torch.autograd.gradcheck(loss, anchors)
    loss(anchors).backward()
    assert anchors.grad is not None
    assert anchors.grad.abs().min() > 0
    assert bank.grad is None
    assert z.grad is None


def test_half_precision_is_computed_in_float32() -> None:
    anchors, bank, index = unit(8, 16).bfloat16(), unit(40, 16, seed=1).bfloat16(), positions(8, 30, below=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = bank_logits(anchors, bank, index, temperature=0.07)
        value = noise_contrastive(logits, images=40, partition=partition_estimate(logits, images=40))
    assert logits.dtype == value.dtype == torch.float32
    exact = bank_logits(anchors.double(), bank.double(), index, temperature=0.07)
    expected = noise_contrastive(exact, images=40, partition=partition_estimate(exact, images=40))
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"not \[3, 4\], \[9, 5\], \[3, 6\]"):
        bank_logits(unit(3, 4), unit(9, 5), positions(3, 6, below=9), temperature=0.1)
    with pytest.raises(ValueError, match=r"\[2, 6\]"):
        bank_logits(unit(3, 4), unit(9, 4), positions(2, 6, below=9), temperature=0.1)
    with pytest.raises(ValueError, match="temperature is 0"):
        bank_logits(unit(3, 4), unit(9, 4), positions(3, 6, below=9), temperature=0)
    with pytest.raises(ValueError, match=r"K of at least 1, not \[3, 1\]"):
        noise_contrastive(unit(3, 1), images=9, partition=torch.tensor(1.0))
