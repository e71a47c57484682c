"""SimSiam's and BYOL's losses against loops written from their equations, their limits, and what they do not see."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvmr.losses.cosine import negative_cosine, normalised_distance, normalised_std

Loss = Callable[[Tensor, Tensor], Tensor]
both_losses = pytest.mark.parametrize("loss", [negative_cosine, normalised_distance])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def length(row: Tensor) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in row))


def test_negative_cosine_equals_a_slow_loop() -> None:
    p, z = normal(7, 5), normal(7, 5, seed=1)
    total = 0.0
    for i in range(7):  # SimSiam Eq. 1
        total -= sum(float(p[i, d]) / length(p[i]) * float(z[i, d]) / length(z[i]) for d in range(5)) / 7
    assert negative_cosine(p, z).item() == pytest.approx(total, abs=1e-10)


def test_normalised_distance_equals_a_slow_loop() -> None:
    q, z = normal(7, 5), normal(7, 5, seed=1)
    distance, through_cosine = 0.0, 0.0
    for i in range(7):  # BYOL Eq. 2, both of its forms
        distance += sum((float(q[i, d]) / length(q[i]) - float(z[i, d]) / length(z[i])) ** 2 for d in range(5)) / 7
        inner = sum(float(q[i, d]) * float(z[i, d]) for d in range(5))
        through_cosine += (2 - 2 * inner / (length(q[i]) * length(z[i]))) / 7
    assert normalised_distance(q, z).item() == pytest.approx(distance, abs=1e-10)
    assert normalised_distance(q, z).item() == pytest.approx(through_cosine, abs=1e-10)


def test_normalised_std_equals_a_slow_loop() -> None:
    z = normal(9, 4) + 0.5
    total = 0.0
    for d in range(4):
        column = [float(z[i, d]) / length(z[i]) for i in range(9)]
        mean = sum(column) / 9
        total += math.sqrt(sum((value - mean) ** 2 for value in column) / 9) / 4
    assert normalised_std(z).item() == pytest.approx(total, abs=1e-10)


def test_equal_orthogonal_and_opposite_pairs() -> None:
    p = normal(6, 8)
    orthogonal = torch.stack([-p[:, 1], p[:, 0], -p[:, 3], p[:, 2], -p[:, 5], p[:, 4], -p[:, 7], p[:, 6]], dim=1)
    for z, cosine, distance in ((3 * p, -1.0, 0.0), (orthogonal, 0.0, 2.0), (-p, 1.0, 4.0)):
        assert negative_cosine(p, z).item() == pytest.approx(cosine, abs=1e-12)
        assert normalised_distance(p, z).item() == pytest.approx(distance, abs=1e-12)


@both_losses
def test_scales_rotations_and_orders_do_not_matter(loss: Loss) -> None:
    p, z = normal(12, 6), normal(12, 6, seed=1)
    expected = loss(p, z).item()
    scales = normal(12, 1, seed=2).exp()  # one a row
    rotation = torch.linalg.qr(normal(6, 6, seed=3)).Q
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    for a, b in ((scales * p, z), (p, 1e-6 * z), (p @ rotation, z @ rotation), (p[order], z[order]), (z, p)):
        assert loss(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert loss(p, z[order]).item() != pytest.approx(expected, abs=1e-3), "pairs matter"


@both_losses
def test_the_gradient_reaches_both_and_is_across_the_embedding(loss: Loss) -> None:
    p, z = normal(5, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (p, z))
    loss(p, z).backward()
    for x in (p, z):
        assert x.grad is not None
        assert x.grad.norm() > 0.01
        assert (x.grad * x).sum(1).abs().max() < 1e-12, "lengths are not pulled at"


def test_the_distance_is_two_plus_twice_the_negative_cosine() -> None:
    p, z = normal(5, 4), normal(5, 4, seed=1)
    gradients = []
    for loss in (normalised_distance, lambda a, b: 2 + 2 * negative_cosine(a, b)):
        a = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(a, z), a)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p, z = (normal(64, 32, seed=seed).to(dtype) * 300 for seed in (0, 1))  # squares near 90,000 overflow float16
    for function in (negative_cosine, normalised_distance, lambda a, b: normalised_std(a)):
        with torch.autocast("cpu", dtype=dtype):
            value = function(p, z)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(function(p.double(), z.double()).item(), abs=1e-6)


@both_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_zeros_is_harmless(loss: Loss, dtype: torch.dtype) -> None:
    p, z = normal(4, 3, dtype=dtype), normal(4, 3, seed=1, dtype=dtype)
    p[1] = 0.0
    p.requires_grad_()
    value = loss(p, z)
    value.backward()
    kept = [0, 2, 3]
    at_zero = 0.0 if loss is negative_cosine else 1.0
    assert value.item() == pytest.approx((3 * loss(p[kept], z[kept]).item() + at_zero) / 4, abs=1e-6)
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_normalised_std_tells_spread_from_collapse() -> None:
    width = 64
    spread = normal(4096, width)
    assert normalised_std(spread).item() == pytest.approx(1 / math.sqrt(width), rel=0.01)
    axes = torch.cat([torch.eye(width), -torch.eye(width)]).double()  # the bound itself
    assert normalised_std(axes).item() == pytest.approx(1 / math.sqrt(width), abs=1e-12)
    assert normalised_std(normal(1, width).expand(128, -1)).item() == pytest.approx(0, abs=1e-12)
    assert normalised_std(normal(32, 1).abs() * normal(1, width)).item() == pytest.approx(0, abs=1e-12)
    assert 0 < normalised_std(normal(4096, width) + 3).item() < 0.5 / math.sqrt(width)
    assert not normalised_std(spread.requires_grad_()).requires_grad


def own_part(rank: int, world_size: int) -> list[Tensor]:
    """Each loss and its gradient on one rank's rows of a batch."""
    found = []
    for loss in (negative_cosine, normalised_distance):
        p, z = (normal(8, 5, seed=seed).chunk(world_size)[rank] for seed in (0, 1))
        p = p.clone().requires_grad_()
        value = loss(p, z)
        value.backward()
        found += [value.detach(), p.grad]
    return found


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch() -> None:
    """Linear in the batch, so that parts of it need no gathering; DDP divides each rank's gradient by their number."""
    whole = own_part(0, 1)
    parts = [own_part(rank, 2) for rank in range(2)]
    for k in (0, 2):
        torch.testing.assert_close((parts[0][k] + parts[1][k]) / 2, whole[k], rtol=0, atol=1e-13)
        rows = torch.cat([parts[0][k + 1], parts[1][k + 1]]) / 2
        torch.testing.assert_close(rows, whole[k + 1], rtol=0, atol=1e-13)


@both_losses
def test_other_shapes_are_refused(loss: Loss) -> None:
    for p, z in ((normal(4, 3), normal(4, 2)), (normal(4, 3), normal(1, 3)), (normal(4), normal(4))):
        with pytest.raises(ValueError, match=r"two \[B, D\] embeddings"):
            loss(p, z)
