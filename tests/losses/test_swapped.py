"""The losses of codes against loops over SwAV's and OSS's equations, their limits, and one gradient on any ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvmr.losses.domain import domain_accuracy, domain_sum
from mvmr.losses.swapped import code_terms, multi_view_sum, prediction_costs, swapped_prediction, swapped_sum
from ranks import averaged_gradients, run_on_ranks

B, V, A, K = 5, 4, 2, 7


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def codes_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.softmax(2 * normal(*shape, seed=seed), -1)


def cost(scores: Tensor, code: Tensor, temperature: float) -> float:
    """L_c of one embedding and one code (SwAV Eq. 2, OSS Eq. 3): both [K]."""
    exponentials = [math.exp(float(s) / temperature) for s in scores]
    return -sum(float(q) * math.log(e / sum(exponentials)) for q, e in zip(code, exponentials, strict=True))


def slow_swapped(scores: Tensor, codes: Tensor, temperature: float) -> float:
    """SwAV Eq. 6: the sum over codes i and views v != i, of every image."""
    total = 0.0
    for b in range(len(scores)):
        for i in range(codes.shape[1]):
            for v in range(scores.shape[1]):
                if v != i:
                    total += cost(scores[b, v], codes[b, i], temperature) / len(scores)
    return total


@pytest.mark.parametrize(("views", "known"), [(2, 2), (4, 2), (8, 2), (3, 1), (3, 3)])
def test_swapped_prediction_equals_a_loop(views: int, known: int) -> None:
    scores, codes = normal(B, views, K), codes_of(B, known, K)
    found = swapped_prediction(scores, codes, temperature=0.3).item()
    assert found * known * (views - 1) == pytest.approx(slow_swapped(scores, codes, 0.3), abs=1e-10)


def test_costs_equal_a_loop() -> None:
    scores, codes = normal(B, V, K), codes_of(B, A, K)
    found = prediction_costs(scores, codes, temperature=0.5)
    assert found.shape == (V, A)
    for v in range(V):
        for a in range(A):
            expected = sum(cost(scores[b, v], codes[b, a], 0.5) for b in range(B)) / B
            assert found[v, a].item() == pytest.approx(expected, abs=1e-10)


def test_oss_sums_equal_loops_over_equations_2_and_5() -> None:
    full, dropped, codes = normal(B, 2, K), normal(B, V + 2, K, seed=2), codes_of(B, 2, K)
    small = normal(B, V, K, seed=3)
    t = sum(cost(full[b, 0], codes[b, 1], 0.1) + cost(full[b, 1], codes[b, 0], 0.1) for b in range(B)) / B
    found, count = swapped_sum(full, codes, temperature=0.1)
    assert (found.item(), count) == (pytest.approx(t, abs=1e-10), 2)
    mv = 0.0
    for b in range(B):
        for i in range(2):
            for v in range(V + 2):
                mv += cost(dropped[b, v], codes[b, i], 0.1) / B
            for v in range(V):
                mv += cost(small[b, v], codes[b, i], 0.1) / B
    (of_dropped, n), (of_small, m) = (multi_view_sum(x, codes, temperature=0.1) for x in (dropped, small))
    assert (of_dropped + of_small).item() == pytest.approx(mv, abs=1e-9)
    assert (n, m) == (2 * (V + 2), 2 * V)


def test_without_dropout_osss_sums_are_swavs() -> None:
    scores, codes = normal(B, V + 2, K), codes_of(B, 2, K)
    t, n = swapped_sum(scores[:, :2], codes, temperature=0.1)
    mv, m = multi_view_sum(scores[:, 2:], codes, temperature=0.1)
    assert n + m == 2 * (V + 1)
    torch.testing.assert_close((t + mv) / (n + m), swapped_prediction(scores, codes, temperature=0.1))


def test_uniform_answers_cost_the_logarithm_of_k() -> None:
    uniform = torch.full((B, A, K), 1 / K, dtype=torch.float64)
    for scores, codes in [(torch.ones(B, V, K), uniform), (torch.zeros(B, V, K), codes_of(B, A, K))]:
        found = swapped_prediction(scores.double(), codes, temperature=0.1)
        assert found.item() == pytest.approx(math.log(K), abs=1e-12)
    # Knowing more than the code does costs more than not knowing.
    assert swapped_prediction(normal(B, V, K), uniform, temperature=0.1).item() > math.log(K)


def test_the_right_prediction_costs_the_codes_entropy() -> None:
    code = codes_of(B, 1, K).expand(B, A, K)
    scores = (0.2 * code[:, :1].log() + 3.0).expand(B, V, K)
    entropy = -(code[:, 0] * code[:, 0].log()).sum(1).mean()
    torch.testing.assert_close(swapped_prediction(scores, code, temperature=0.2), entropy)


def test_order_of_images_prototypes_and_small_views_does_not_matter() -> None:
    scores, codes = normal(B, V, K), codes_of(B, A, K)
    loss = swapped_prediction(scores, codes, temperature=0.1)
    images, prototypes = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (B, K))
    same = [
        (scores[images], codes[images]),
        (scores[..., prototypes], codes[..., prototypes]),
        (scores[:, [0, 1, 3, 2]], codes),
        (scores[:, [1, 0, 2, 3]], codes.flip(1)),
    ]
    for other_scores, other_codes in same:
        torch.testing.assert_close(swapped_prediction(other_scores, other_codes, temperature=0.1), loss)
    assert (swapped_prediction(scores[:, [1, 0, 2, 3]], codes, temperature=0.1) - loss).abs() > 1e-3


@pytest.mark.parametrize("function", [swapped_prediction, lambda *a, **k: multi_view_sum(*a, **k)[0]])
def test_gradient_is_that_of_the_scores_alone(function: Callable[..., Tensor]) -> None:
    scores, codes = normal(B, V, K).requires_grad_(), codes_of(B, A, K).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: function(s, codes, temperature=0.3), scores)
    function(scores, codes, temperature=0.3).backward()
    assert codes.grad is None


def test_gradient_is_prediction_minus_code() -> None:
    scores, codes = normal(B, V, K).requires_grad_(), codes_of(B, A, K)
    swapped_prediction(scores, codes, temperature=0.3).backward()
    p = torch.softmax(scores.detach() / 0.3, -1)
    expected = torch.stack([sum(p[:, v] - codes[:, a] for a in range(A) if a != v) for v in range(V)], dim=1)
    torch.testing.assert_close(scores.grad, expected / 0.3 / (A * (V - 1)) / B, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores, codes = normal(B, V, K, dtype=dtype), codes_of(B, A, K).float()
    with torch.autocast("cpu", dtype=dtype):
        found = swapped_prediction(scores, codes, temperature=0.1)
    assert found.dtype == torch.float32
    exact = swapped_prediction(scores.double(), codes.double(), temperature=0.1)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_scores_far_apart_stay_finite() -> None:
    scores = (1e4 * normal(B, V, K, dtype=torch.float32)).requires_grad_()
    loss = swapped_prediction(scores, codes_of(B, A, K).float(), temperature=0.1)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def slow_domain(teacher: Tensor, student: Tensor) -> float:
    """OSS Eq. 7, number by number."""
    total = 0.0
    for b in range(len(teacher)):
        for i in range(teacher.shape[1]):
            d_t, d_s = ([math.exp(float(x)) for x in scores[b, i]] for scores in (teacher, student))
            total -= (math.log(d_t[0] / sum(d_t)) + math.log(d_s[1] / sum(d_s))) / len(teacher)
    return total


def test_domain_sum_equals_a_loop_over_equation_7() -> None:
    teacher, student = normal(B, 2, 2), normal(B, 2, 2, seed=1)
    found, count = domain_sum(teacher, student)
    assert (found.item(), count) == (pytest.approx(slow_domain(teacher, student), abs=1e-10), 4)
    chance, _ = domain_sum(torch.zeros(B, 2, 2), torch.zeros(B, 2, 2))
    assert chance.item() == pytest.approx(4 * math.log(2))
    assert torch.autograd.gradcheck(
        lambda t, s: domain_sum(t, s)[0], (teacher.requires_grad_(), student.requires_grad_())
    )


def test_domain_accuracy_counts_both_networks() -> None:
    sure = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]])  # both say: teacher
    assert domain_accuracy(sure, sure.flip(2)).item() == 1.0
    assert domain_accuracy(sure, sure).item() == 0.5
    assert domain_accuracy(sure.flip(2), sure).item() == 0.0


def test_terms_tell_what_codes_mean() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    scores, codes = eye[:, None].repeat(1, 2, 1), eye[:, None].repeat(1, 2, 1)
    terms = code_terms(scores, codes, 0.01)
    assert terms["agreement"] == 1.0
    assert terms["entropy/code"] == 0.0
    assert terms["entropy/mean"].item() == pytest.approx(math.log(4))
    other = codes.clone()
    other[0, 1] = eye[2]  # one code of eight is another
    assert code_terms(scores, other, 0.01)["agreement"] == 7 / 8
    assert code_terms(eye[:1, None].repeat(4, 2, 1), codes, 0.01)["entropy/mean"] < 1e-6


def gradient_of_a_part(rank: int, world_size: int) -> Tensor:
    """Of a linear net; the losses are means over images, so the ranks' mean is the whole's."""
    net = torch.nn.Linear(3, K, bias=False).double()
    torch.nn.init.zeros_(net.weight).data += normal(K, 3)
    x, codes = normal(8, V, 3, seed=1), codes_of(8, A, K, seed=2)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    scores = net(x[mine])
    sums = (
        swapped_sum(scores[:, :2], codes[mine], temperature=0.2)[0] + domain_sum(scores[..., :2], scores[..., 2:4])[0]
    )
    (swapped_prediction(scores, codes[mine], temperature=0.1) + sums).backward()
    return averaged_gradients(net, world_size)["weight"]


def test_two_ranks_have_the_gradient_of_one() -> None:
    whole = gradient_of_a_part(0, 1)
    for found in run_on_ranks(gradient_of_a_part, 2, 2):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-13)


def test_refuses() -> None:
    codes = codes_of(B, A, K)
    for scores in (normal(B, V, K + 1), normal(B + 1, V, K), normal(B, K)):
        with pytest.raises(ValueError, match=r"predict \[B, A, K\] codes"):
            swapped_prediction(scores, codes, temperature=0.1)
    for scores, known in [(normal(B, 1, K), codes[:, :1]), (normal(B, 1, K), codes), (normal(B, V, K), codes[:, :0])]:
        with pytest.raises(ValueError, match="nothing to swap"):
            swapped_prediction(scores, known, temperature=0.1)
    with pytest.raises(ValueError, match="temperature is 0"):
        swapped_prediction(normal(B, V, K), codes, temperature=0.0)
    with pytest.raises(ValueError, match=r"two \[B, I, 2\] scores"):
        domain_sum(normal(B, 2, 2), normal(B, 2, 3))
