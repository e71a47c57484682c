"""InfoNCE over a queue against a slow loop, its limits, and where its gradient goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mvmr.losses.info_nce import info_nce, queue_logits, top1


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def loss_of(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    return info_nce(queue_logits(query, key, queue, temperature=temperature))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_equals_slow_loop(temperature: float) -> None:
    query, key, queue = unit(5, 7), unit(5, 7, seed=1), unit(11, 7, seed=2)
    total = 0.0
    for i in range(5):  # Eq. 1: -log exp(q.k+ / tau) / sum over the own key and the queue of exp(q.k / tau)
        own = math.exp(sum(float(query[i, d] * key[i, d]) for d in range(7)) / temperature)
        others = 0.0
        for j in range(11):
            others += math.exp(sum(float(query[i, d] * queue[j, d]) for d in range(7)) / temperature)
        total -= math.log(own / (own + others))
    assert loss_of(query, key, queue, temperature).item() == pytest.approx(total / 5, abs=1e-10)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_equal_pair_and_orthogonal_queue(temperature: float) -> None:
    axes = torch.eye(12, dtype=torch.float64)
    query, queue = axes[:2], axes[2:]  # K = 10 keys at a right angle to both
    expected = math.log(1 + 10 * math.exp(-1 / temperature))
    logits = queue_logits(query, query, queue, temperature=temperature)
    assert info_nce(logits).item() == pytest.approx(expected, abs=1e-12)
    assert top1(logits).item() == 1.0


@pytest.mark.parametrize(("temperature", "error"), [(1.0, 0.05), (0.2, 0.2)])
def test_unrelated_keys_are_near_the_logarithm_of_their_number(temperature: float, error: float) -> None:
    query, key, queue = unit(64, 128), unit(64, 128, seed=1), unit(4096, 128, seed=2)
    # exp(q.k / tau) of unrelated keys has mean exp(1 / (2 D tau^2)) where D is large.
    expected = math.log(4097) + 1 / (2 * 128 * temperature**2)
    assert loss_of(query, key, queue, temperature).item() == pytest.approx(expected, abs=error)


def test_one_for_all_is_exactly_the_logarithm_of_their_number() -> None:
    same = unit(1, 6)
    logits = queue_logits(same.expand(4, 6), same.expand(4, 6), same.expand(9, 6), temperature=0.2)
    assert info_nce(logits).item() == pytest.approx(math.log(10), abs=1e-12)
    assert top1(logits).item() == 0.0, "a collapsed network tells nothing apart"


def test_order_of_the_queue_and_of_the_images_does_not_matter() -> None:
    query, key, queue = unit(5, 7), unit(5, 7, seed=1), unit(11, 7, seed=2)
    expected = loss_of(query, key, queue, 0.2).item()
    assert loss_of(query, key, queue.flip(0), 0.2).item() == pytest.approx(expected, abs=1e-12)
    assert loss_of(query.flip(0), key.flip(0), queue, 0.2).item() == pytest.approx(expected, abs=1e-12)
    assert abs(loss_of(query, key.flip(0), queue, 0.2).item() - expected) > 1e-3, "but which key is whose does"


def test_gradient_reaches_the_queries_alone() -> None:
    query, key, queue = (unit(4, 6, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda q: loss_of(q, key, queue, 0.2), query)
    query.grad = None
    loss_of(query, key, queue, 0.2).backward()
    assert query.grad is not None
    assert query.grad.abs().min() > 0
    assert key.grad is None
    assert queue.grad is None


def test_top1_counts_queries_nearer_to_their_own_key() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 0.0], [2.0, 2.0, 1.0], [0.0, -1.0, -2.0]])
    assert top1(logits).item() == 0.5


def test_half_precision_is_computed_in_float32() -> None:
    query, key, queue = unit(8, 32).bfloat16(), unit(8, 32, seed=1).bfloat16(), unit(20, 32, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss_of(query, key, queue, 0.07)
    assert value.dtype == torch.float32
    expected = loss_of(query.double(), key.double(), queue.double(), 0.07)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"queries \[B, D\], keys \[B, D\] and a queue \[K, D\], not \[4, 3\], \[1, 3\]"
    ):
        queue_logits(unit(4, 3), unit(1, 3), unit(5, 3), temperature=0.2)  # would broadcast
    with pytest.raises(ValueError, match=r"\[5, 4\]"):
        queue_logits(unit(4, 3), unit(4, 3), unit(5, 4), temperature=0.2)
    with pytest.raises(ValueError, match="temperature is 0"):
        queue_logits(unit(4, 3), unit(4, 3), unit(5, 3), temperature=0)
