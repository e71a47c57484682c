"""DINO's loss against a double loop over its equations, its limits, and the sign of the centre."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mvmr.losses.self_distillation import entropy, self_distillation, sharpened
from ranks import averaged_gradients, run_on_ranks

B, V, T, K = 5, 4, 2, 7


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def slow(student: Tensor, teacher: Tensor, centre: Tensor, tau_s: float, tau_t: float) -> float:
    """Eqs. 1 to 3 with the minus of Algorithm 1: every pair of a teacher's and another student's view, every k."""
    total, pairs = 0.0, 0
    for t in range(teacher.shape[1]):
        for v in range(student.shape[1]):
            if t == v:
                continue
            pairs += 1
            for b in range(len(student)):
                p_t = softmax([(float(teacher[b, t, k]) - float(centre[k])) / tau_t for k in range(K)])
                p_s = softmax([float(student[b, v, k]) / tau_s for k in range(K)])
                total -= sum(p_t[k] * math.log(p_s[k]) for k in range(K)) / len(student)
    return total / pairs


@pytest.mark.parametrize(("views", "known"), [(2, 2), (4, 2), (3, 1), (3, 3)])
def test_equals_a_loop_over_the_equations(views: int, known: int) -> None:
    student, teacher, centre = normal(B, views, K), normal(B, known, K, seed=1), normal(K, seed=2)
    p = sharpened(teacher, centre, temperature=0.3)
    found = self_distillation(student, p, temperature=0.5)
    assert found.item() == pytest.approx(slow(student, teacher, centre, 0.5, 0.3), abs=1e-10)
    # The wrong sign, which the paper's text prints, is another loss.
    assert abs(found.item() - slow(student, teacher, -centre, 0.5, 0.3)) > 0.01


def test_a_student_that_says_the_same_is_left_with_the_entropy() -> None:
    """With s / tau_s = (g - c) / tau_t for every view, CE(P_t, P_s) = H(P_t)."""
    teacher, centre = normal(B, 1, K).expand(B, T, K), normal(K, seed=1)
    p = sharpened(teacher, centre, temperature=0.2)
    student = ((teacher[:, :1] - centre) / 0.2 * 0.7).expand(B, V, K)
    assert self_distillation(student, p, temperature=0.7).item() == pytest.approx(entropy(p).mean().item(), abs=1e-12)
    other = student + normal(B, V, K, seed=2)
    assert self_distillation(other, p, temperature=0.7) > entropy(p).mean()  # what is more is the KL divergence


def test_uniform_outputs_cost_the_logarithm_of_k() -> None:
    p = sharpened(torch.full((B, T, K), 3.0, dtype=torch.float64), torch.zeros(K), temperature=0.04)
    assert self_distillation(torch.ones(B, V, K), p, temperature=0.1).item() == pytest.approx(math.log(K), abs=1e-6)
    assert entropy(p).mean().item() == pytest.approx(math.log(K), abs=1e-12)


def test_entropy_of_a_certain_answer_is_zero() -> None:
    assert torch.equal(entropy(torch.eye(3)), torch.zeros(3))
    assert entropy(sharpened(normal(2, K), torch.zeros(K), temperature=1e-5)).abs().max() < 1e-12


def run_with_a_constant(sign: int, steps: int = 60, momentum: float = 0.9) -> list[float]:
    """How far sign * c is from taking a constant out of the teacher's scores, while c follows their mean."""
    scores, constant = 0.1 * normal(64, K), torch.linspace(-2, 2, K, dtype=torch.float64)
    scores = scores - scores.mean(0)
    wanted = sharpened(scores, torch.zeros(K), temperature=0.1)
    centre, found = torch.zeros(K, dtype=torch.float64), []
    for _ in range(steps):
        shifted = scores + constant
        p = sharpened(shifted, sign * centre, temperature=0.1)
        found.append((p - wanted).abs().max().item())
        centre = momentum * centre + (1 - momentum) * shifted.mean(0)
    return found


def test_the_centre_takes_a_constant_out_and_the_other_sign_does_not() -> None:
    right, wrong = run_with_a_constant(1), run_with_a_constant(-1)
    assert right[0] == wrong[0] > 0.5
    assert right[-1] < 0.1  # c is the constant but for .9^60
    assert wrong[-1] > 0.5
    # Collapse: with a plus, every image's answer becomes the one that is the mean's greatest.
    certain = sharpened(0.1 * normal(64, K) + torch.linspace(-2, 2, K), -torch.linspace(-2, 2, K), temperature=0.1)
    assert entropy(certain).max() < 0.01
    assert (certain.argmax(1) == K - 1).all()


def test_order_of_images_and_of_small_views_does_not_matter() -> None:
    student, p = normal(B, V, K), sharpened(normal(B, T, K, seed=1), torch.zeros(K), temperature=0.2)
    loss = self_distillation(student, p, temperature=0.1).item()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert self_distillation(student[order], p[order], temperature=0.1).item() == pytest.approx(loss, abs=1e-12)
    assert self_distillation(student[:, [0, 1, 3, 2]], p, temperature=0.1).item() == pytest.approx(loss, abs=1e-12)
    assert self_distillation(student[:, [1, 0, 2, 3]], p.flip(1), temperature=0.1).item() == pytest.approx(loss)
    assert self_distillation(student[:, [1, 0, 2, 3]], p, temperature=0.1).item() != pytest.approx(loss, rel=1e-3)


def test_gradient_is_the_students_alone_and_right() -> None:
    student = normal(B, V, K).requires_grad_()
    scores = normal(B, T, K, seed=1).requires_grad_()
    p = sharpened(scores, torch.zeros(K), temperature=0.2)
    assert not p.requires_grad
    assert torch.autograd.gradcheck(lambda s: self_distillation(s, p, temperature=0.3), student)
    given = p.clone().requires_grad_()
    self_distillation(student, given, temperature=0.3).backward()
    assert given.grad is None
    # sum over pairs of (P_s - P_t) / tau_s, of each view
    p_s = torch.softmax(student.detach() / 0.3, -1)
    expected = torch.stack([sum(p_s[:, v] - p[:, t] for t in range(T) if t != v) for v in range(V)], dim=1)
    torch.testing.assert_close(student.grad, expected / 0.3 / (T * V - T) / B, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, scores, centre = normal(B, V, K, dtype=dtype), normal(B, T, K, seed=1, dtype=dtype), normal(K, seed=2)
    with torch.autocast("cpu", dtype=dtype):
        p = sharpened(scores, centre.float(), temperature=0.04)
        found = self_distillation(student, p, temperature=0.1)
    assert p.dtype == found.dtype == torch.float32
    exact = self_distillation(student.double(), sharpened(scores.double(), centre, temperature=0.04), temperature=0.1)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_scores_far_apart_stay_finite() -> None:
    student = (1e4 * normal(B, V, K, dtype=torch.float32)).requires_grad_()
    p = sharpened(1e4 * normal(B, T, K, seed=1, dtype=torch.float32), torch.zeros(K), temperature=0.04)
    loss = self_distillation(student, p, temperature=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def gradient_of_a_part(rank: int, world_size: int) -> Tensor:
    """Of the weights of a linear student; the loss is a mean over images, so the ranks' mean is the whole's."""
    net = torch.nn.Linear(3, K, bias=False).double()
    torch.nn.init.constant_(net.weight, 0.1).data += normal(K, 3)
    x, scores = normal(8, V, 3, seed=1), normal(8, T, K, seed=2)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    p = sharpened(scores[mine], torch.zeros(K), temperature=0.2)
    self_distillation(net(x[mine]), p, temperature=0.1).backward()
    return averaged_gradients(net, world_size)["weight"]


def test_two_ranks_have_the_gradient_of_one() -> None:
    whole = gradient_of_a_part(0, 1)
    for found in run_on_ranks(gradient_of_a_part, 2, 2):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-13)


def test_refuses() -> None:
    p = sharpened(normal(B, T, K), torch.zeros(K), temperature=0.1)
    for student, teacher in [
        (normal(B, 1, K), p),  # fewer views than the teacher has
        (normal(B, 1, K), p[:, :1]),  # a view with itself alone
        (normal(B, V, K + 1), p),
        (normal(B + 1, V, K), p),
        (normal(B, K), p),
        (normal(B, V, K), p[:, :0]),
    ]:
        with pytest.raises(ValueError, match=r"compares \[B, V, K\]"):
            self_distillation(student, teacher, temperature=0.1)
