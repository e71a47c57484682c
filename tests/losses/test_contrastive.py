"""NT-Xent and the in-batch InfoNCE against double loops, their limits, invariances, and the gradient on two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvmr.losses.contrastive import in_batch_info_nce, nt_xent
from mvmr.ops.collectives import gather
from ranks import run_on_ranks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    dot, aa, bb = (sum(float(x) * float(y) for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def slow_nt_xent(z1: Tensor, z2: Tensor, t: float) -> tuple[float, float]:
    """Algorithm 1 of SimCLR, whose views 2k - 1 and 2k are those of image k."""
    z = [view for pair in zip(z1, z2, strict=True) for view in pair]
    total, hits = 0.0, 0
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        others = {k: cosine(z[i], z[k]) for k in range(len(z)) if k != i}
        total -= math.log(math.exp(others[j] / t) / sum(math.exp(s / t) for s in others.values()))  # Eq. 1
        hits += max(others, key=lambda k: others[k]) == j
    return total / len(z), hits / len(z)


def slow_ctr(queries: Tensor, keys: Tensor, t: float, offset: int) -> tuple[float, float]:
    """`ctr` of MoCo v3's Algorithm 1, with Eq. 1 for every query."""
    total, hits = 0.0, 0
    for i, q in enumerate(queries):
        s = [cosine(q, k) for k in keys]
        total -= math.log(math.exp(s[offset + i] / t) / sum(math.exp(value / t) for value in s))
        hits += s.index(max(s)) == offset + i
    return 2 * t * total / len(queries), hits / len(queries)


def test_nt_xent_equals_slow_loop() -> None:
    z1 = normal(7, 5)
    z2 = z1 + 1.2 * normal(7, 5, seed=1)
    for t in (0.1, 0.5, 2.0):
        loss, accuracy = nt_xent(z1, z2, temperature=t)
        expected, hits = slow_nt_xent(z1, z2, t)
        assert loss.item() == pytest.approx(expected, abs=1e-10)
        assert accuracy.item() == pytest.approx(hits, abs=1e-12)
    assert 0 < accuracy < 1


def test_in_batch_info_nce_equals_slow_loop() -> None:
    keys = normal(9, 5)
    queries = keys[3:7] + 0.8 * normal(4, 5, seed=1)
    for t in (0.2, 1.0):
        loss, accuracy = in_batch_info_nce(queries, keys, temperature=t, offset=3)
        expected, hits = slow_ctr(queries, keys, t, 3)
        assert loss.item() == pytest.approx(expected, abs=1e-10)
        assert accuracy.item() == pytest.approx(hits, abs=1e-12)
    assert 0 < accuracy < 1


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_equal_views_of_orthogonal_images(t: float) -> None:
    z = 3 * torch.eye(6, 8, dtype=torch.float64)
    loss, accuracy = nt_xent(z, z, temperature=t)
    assert loss.item() == pytest.approx(math.log(1 + (2 * 6 - 2) * math.exp(-1 / t)), abs=1e-12)
    assert accuracy == 1
    loss, accuracy = in_batch_info_nce(z, z, temperature=t)
    assert loss.item() == pytest.approx(2 * t * math.log(1 + (6 - 1) * math.exp(-1 / t)), abs=1e-12)
    assert accuracy == 1


def test_collapse_and_infinite_temperature_cost_the_logarithm_of_the_choices() -> None:
    same = normal(1, 5).expand(6, 5)
    assert nt_xent(same, same, temperature=0.1)[0].item() == pytest.approx(math.log(2 * 6 - 1), abs=1e-12)
    assert in_batch_info_nce(same, same, temperature=0.2)[0].item() == pytest.approx(0.4 * math.log(6), abs=1e-12)
    loss, _ = nt_xent(normal(6, 5), normal(6, 5, seed=1), temperature=1e9)
    assert loss.item() == pytest.approx(math.log(2 * 6 - 1), abs=1e-8)


@pytest.mark.parametrize("value", [nt_xent, in_batch_info_nce])
def test_rotation_scale_and_order_of_images_change_nothing(value: Callable[..., tuple[Tensor, Tensor]]) -> None:
    z1, z2 = normal(6, 5), normal(6, 5, seed=1)
    rotation, _ = torch.linalg.qr(normal(5, 5, seed=2))
    scales = normal(6, 1, seed=3).exp()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    expected = value(z1, z2, temperature=0.3)[0].item()
    for a, b in [(z1 @ rotation, z2 @ rotation), (scales * z1, 7 * z2), (z1[order], z2[order])]:
        assert value(a, b, temperature=0.3)[0].item() == pytest.approx(expected, abs=1e-12)
    assert value(z1, z2[order], temperature=0.3)[0].item() != pytest.approx(expected, abs=1e-3)


def test_nt_xent_is_symmetric_in_the_views() -> None:
    z1, z2 = normal(6, 5), normal(6, 5, seed=1)
    assert nt_xent(z1, z2, temperature=0.3)[0].item() == pytest.approx(
        nt_xent(z2, z1, temperature=0.3)[0].item(), abs=1e-12
    )


def test_one_temperature_scales_the_gradient_as_another() -> None:
    """What 2 t is for: near equal similarities the gradient of `ctr` does not depend on t."""
    keys = normal(1, 5) + 1e-4 * normal(6, 5, seed=1)
    sizes = []
    for t in (0.2, 1.0):
        queries = keys.clone().requires_grad_()
        in_batch_info_nce(queries, keys, temperature=t)[0].backward()
        assert queries.grad is not None
        sizes.append(queries.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)


def test_gradcheck() -> None:
    z1, z2 = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.3)[0], (z1, z2))
    assert torch.autograd.gradcheck(lambda a, b: in_batch_info_nce(a[:2], b, temperature=0.3, offset=1)[0], (z1, z2))
    assert not nt_xent(z1, z2, temperature=0.3)[1].requires_grad
    assert not in_batch_info_nce(z1, z2, temperature=0.3)[1].requires_grad


@pytest.mark.parametrize("value", [nt_xent, in_batch_info_nce])
def test_half_precision_is_computed_in_float32(value: Callable[..., tuple[Tensor, Tensor]]) -> None:
    z1, z2 = (300 * normal(32, 64, seed=seed).to(torch.float16) for seed in (0, 1))  # squared norms overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = value(z1, z2, temperature=0.05)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value(z1.double(), z2.double(), temperature=0.05)[0].item(), rel=1e-5)


def gradients(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Averaged over ranks as DDP does: gradients of one weight [5, 4] under both losses, and the mean of the second."""
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    x1, x2 = normal(8, 5)[rows], normal(8, 5, seed=1)[rows]
    found = []
    for name in ("nt_xent", "in_batch"):
        weight = normal(5, 4, seed=2).requires_grad_()
        if name == "nt_xent":
            loss, _ = nt_xent(gather(x1 @ weight), gather(x2 @ weight), temperature=0.3)
        else:
            keys = gather((x2 @ weight).detach())
            loss, _ = in_batch_info_nce(x1 @ weight, keys, temperature=0.3, offset=rows.start)
        loss.backward()
        assert weight.grad is not None
        found.append(weight.grad)
    found.append(loss.detach())
    if world_size > 1:
        for value in found:
            torch.distributed.all_reduce(value)
    gradient1, gradient2, mean = (value / world_size for value in found)
    return gradient1, gradient2, mean


def test_gradient_on_two_ranks_is_that_of_one_process() -> None:
    whole = gradients(0, 1)
    for found in run_on_ranks(gradients, 2, 2):
        for value, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_refuses() -> None:
    z = normal(4, 3)
    with pytest.raises(ValueError, match="rows of one width"):
        nt_xent(z, z[:, :2], temperature=0.1)
    with pytest.raises(ValueError, match="pairs rows"):
        nt_xent(z, z[:2], temperature=0.1)
    with pytest.raises(ValueError, match="rows of one width"):
        in_batch_info_nce(z[0], z, temperature=0.1)
    with pytest.raises(ValueError, match="more than 4 keys"):
        in_batch_info_nce(z[:2], z, temperature=0.1, offset=3)
    with pytest.raises(ValueError, match="must be positive"):
        nt_xent(z, z, temperature=0.0)
