"""SEED's, CompRess's and the regressions' losses against slow loops, their limits, and where gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mvmr.losses.info_nce import info_nce, queue_logits
from mvmr.losses.similarity_distillation import (
    anchor_logits,
    distribution_divergence,
    regression,
    soft_cross_entropy,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(rows(*shape, seed=seed), dim=1)


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [0.04, 1.0])
def test_anchor_logits_equal_slow_loop(temperature: float) -> None:
    x, anchors = unit(3, 5), unit(4, 5, seed=1)
    found = anchor_logits(x, anchors, temperature=temperature)
    for i in range(3):
        for j in range(4):
            expected = sum(float(x[i, d] * anchors[j, d]) for d in range(5)) / temperature
            assert found[i, j].item() == pytest.approx(expected, abs=1e-10)


def test_cross_entropy_and_divergence_equal_slow_loops() -> None:
    student, teacher = rows(5, 7), rows(5, 7, seed=1)
    entropy = divergence = 0.0
    for i in range(5):
        p, q = softmax(teacher[i].tolist()), softmax(student[i].tolist())
        for j in range(7):
            entropy -= p[j] * math.log(q[j]) / 5
            divergence += p[j] * (math.log(p[j]) - math.log(q[j])) / 5
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(entropy, abs=1e-10)
    assert distribution_divergence(student, teacher).item() == pytest.approx(divergence, abs=1e-10)


def test_equal_distributions_have_no_divergence_and_their_entropy() -> None:
    logits = rows(6, 9)
    p = logits.softmax(1)
    # A number added to all of a row's logits changes nothing.
    assert distribution_divergence(logits + 3.0, logits).item() == pytest.approx(0.0, abs=1e-12)
    entropy = -(p * p.log()).sum(1).mean()
    assert soft_cross_entropy(logits + 3.0, logits).item() == pytest.approx(entropy.item(), abs=1e-12)
    assert distribution_divergence(rows(6, 9, seed=1), logits).item() > 0.1


def test_both_have_the_gradient_of_one_another() -> None:
    found = []
    for loss in (soft_cross_entropy, distribution_divergence):
        student = rows(4, 6).requires_grad_()
        loss(student, rows(4, 6, seed=1)).backward()
        found.append(student.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    assert torch.allclose(found[0].sum(1), torch.zeros(4, dtype=torch.float64))


def test_a_cold_teacher_makes_seed_moco_s_loss() -> None:
    """Methods: SEED with tau_T -> 0 is MoCo with the teacher's embedding as the key."""
    s, t, queue = unit(5, 8), unit(5, 8, seed=1), unit(30, 8, seed=2)
    student = queue_logits(s, t, queue, temperature=0.2)
    for temperature, error in ((1e-4, 1e-9), (0.2, None)):
        found = soft_cross_entropy(student, queue_logits(t, t, queue, temperature=temperature)).item()
        if error is not None:
            assert found == pytest.approx(info_nce(student).item(), abs=error)
        else:
            assert abs(found - info_nce(student).item()) > 1e-2


def test_order_of_the_anchors_does_not_matter() -> None:
    student, teacher, order = rows(5, 7), rows(5, 7, seed=1), torch.randperm(7)
    expected = distribution_divergence(student, teacher).item()
    assert distribution_divergence(student[:, order], teacher[:, order]).item() == pytest.approx(expected, abs=1e-12)
    assert abs(distribution_divergence(student[:, order.flip(0)], teacher).item() - expected) > 1e-3


def test_regression_equals_slow_loop() -> None:
    student, teacher = rows(4, 3), rows(4, 3, seed=1)
    plain = sum(float(student[i, d] - teacher[i, d]) ** 2 for i in range(4) for d in range(3)) / 12
    assert regression(student, teacher).item() == pytest.approx(plain, abs=1e-10)
    total = 0.0
    for d in range(3):
        columns = []
        for x in (student, teacher):
            mean = sum(float(x[i, d]) for i in range(4)) / 4
            variance = sum((float(x[i, d]) - mean) ** 2 for i in range(4)) / 4
            columns.append([(float(x[i, d]) - mean) / math.sqrt(variance + 1e-5) for i in range(4)])
        total += sum((a - b) ** 2 for a, b in zip(*columns, strict=True)) / 12
    assert regression(student, teacher, batch_norm=True).item() == pytest.approx(total, abs=1e-10)


def test_regression_with_batch_norm_is_two_minus_twice_the_correlation() -> None:
    student, teacher = rows(50, 3), rows(50, 3, seed=1)
    correlations = [torch.corrcoef(torch.stack([student[:, d], teacher[:, d]]))[0, 1] for d in range(3)]
    expected = 2 - 2 * torch.stack(correlations).mean()
    found = regression(student, teacher, batch_norm=True, epsilon=0.0)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_regression_with_batch_norm_ignores_scale_and_shift_and_equals_torch_s_layer() -> None:
    student, teacher = rows(20, 4), rows(20, 4, seed=1)
    norm = torch.nn.BatchNorm1d(4, affine=False).double()
    expected = (norm(student) - norm(teacher)).square().mean()
    assert regression(student, teacher, batch_norm=True).item() == pytest.approx(expected.item(), abs=1e-12)
    moved = regression(3 * student + 5, 0.5 * teacher - 2, batch_norm=True, epsilon=0.0)
    assert moved.item() == pytest.approx(regression(student, teacher, batch_norm=True, epsilon=0.0).item(), abs=1e-10)
    assert regression(3 * student, teacher).item() > regression(student, teacher).item() + 1


def test_regression_of_a_constant_column_is_finite() -> None:
    student = torch.ones(4, 2, requires_grad=True)
    loss = regression(student, torch.arange(8.0).view(4, 2), batch_norm=True)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss", [soft_cross_entropy, distribution_divergence, regression, lambda s, t: regression(s, t, batch_norm=True)]
)
def test_gradient_reaches_the_student_alone(loss: Loss) -> None:
    student, teacher = rows(5, 4).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_gradient_does_not_reach_the_anchors() -> None:
    x, anchors = unit(3, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_()
    anchor_logits(x, anchors, temperature=0.1).sum().backward()
    assert x.grad is not None
    assert anchors.grad is None


@pytest.mark.parametrize("loss", [soft_cross_entropy, distribution_divergence, regression])
def test_half_precision_is_computed_in_float32(loss: Loss) -> None:
    student, teacher = rows(8, 300).bfloat16(), rows(8, 300, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
        logits = anchor_logits(student, teacher, temperature=0.1)
    assert value.dtype == logits.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-5)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"\[B, D\].*\[K, D\], not \[3, 4\], \[5, 6\]"):
        anchor_logits(rows(3, 4), rows(5, 6), temperature=0.1)
    with pytest.raises(ValueError, match="temperature is 0"):
        anchor_logits(rows(3, 4), rows(5, 4), temperature=0)
    for loss in (soft_cross_entropy, distribution_divergence, regression):
        with pytest.raises(ValueError, match=r"\[4, 3\], \[1, 3\]"):
            loss(rows(4, 3), rows(1, 3))  # would broadcast
    with pytest.raises(ValueError, match="two images or more"):
        regression(rows(1, 3), rows(1, 3), batch_norm=True)
