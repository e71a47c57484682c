"""Collectives: values and gradients on two gloo ranks against one process."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from mvmr.losses import distance_correlation, distance_covariance
from mvmr.ops import collectives
from ranks import run_on_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_process() -> None:
    x = normal(4, 3).requires_grad_()
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
    assert collectives.gather(x) is x
    assert collectives.all_reduce_sum(x) is x


def gathers_every_dtype(rank: int) -> list[Tensor]:
    assert (collectives.world_size(), collectives.rank()) == (2, rank)
    rows = torch.arange(6).view(2, 3) + 6 * rank
    return [collectives.gather(rows.to(dtype)) for dtype in DTYPES]


def test_gather_is_in_rank_order_for_every_dtype() -> None:
    for results in run_on_ranks(gathers_every_dtype, 2):
        for dtype, result in zip(DTYPES, results, strict=True):
            assert torch.equal(result, torch.arange(12).view(4, 3).to(dtype))
            assert result.dtype == dtype


def gathers_other_layouts(rank: int) -> tuple[Tensor, Tensor, bool, bool]:
    transposed = (torch.arange(6).view(3, 2) + 6 * rank).T  # not contiguous
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        without = collectives.gather(x)
    constant = collectives.gather(torch.ones(2))
    return (
        collectives.gather(transposed),
        collectives.gather(torch.tensor([rank])),
        without.requires_grad,
        constant.requires_grad,
    )


def test_gather_of_other_layouts_and_without_gradient() -> None:
    for transposed, vector, without, constant in run_on_ranks(gathers_other_layouts, 2):
        assert transposed.tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
        assert vector.tolist() == [0, 1]
        assert (without, constant) == (False, False)


def network() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layers.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return layers


def loss_of_global_batch(z: Tensor, target: Tensor) -> Tensor:
    """Not linear in the batch, so it tells a global batch from two local ones."""
    return 1 - distance_correlation(z, target) + z.std(0).log().sum()


def gradients_of_half_a_batch(rank: int, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.chunk(2)[rank].clone().requires_grad_()
    layers = network()
    z = collectives.gather(layers(x))
    loss = loss_of_global_batch(z, collectives.gather(target.chunk(2)[rank]))
    loss.backward()
    return loss.detach(), x.grad, [parameter.grad for parameter in layers.parameters()]


def test_gather_with_the_mean_over_ranks_is_the_gradient_of_the_whole_batch() -> None:
    x, target = normal(12, 5), normal(12, 3, seed=9)
    results = run_on_ranks(gradients_of_half_a_batch, 2, x, target)
    x.requires_grad_()
    layers = network()
    loss = loss_of_global_batch(layers(x), target)
    loss.backward()
    for rank_loss, _, _ in results:
        assert torch.allclose(rank_loss, loss, rtol=0, atol=1e-12)
    inputs = torch.cat([result[1] for result in results]) / 2
    assert torch.allclose(inputs, x.grad, rtol=0, atol=1e-12)
    for ours, theirs, parameter in zip(results[0][2], results[1][2], layers.parameters(), strict=True):
        assert torch.allclose((ours + theirs) / 2, parameter.grad, rtol=0, atol=1e-12)


def trains_with_ddp(rank: int, x: Tensor, target: Tensor) -> list[Tensor]:
    layers = nn.parallel.DistributedDataParallel(network())
    z = collectives.gather(layers(x.chunk(2)[rank]))
    loss_of_global_batch(z, collectives.gather(target.chunk(2)[rank])).backward()
    return [parameter.grad for parameter in layers.parameters()]


def test_gradients_under_ddp_are_those_of_one_process() -> None:
    x, target = normal(12, 5), normal(12, 3, seed=9)
    layers = network()
    loss_of_global_batch(layers(x), target).backward()
    for gradients in run_on_ranks(trains_with_ddp, 2, x, target):
        for gradient, parameter in zip(gradients, layers.parameters(), strict=True):
            assert torch.allclose(gradient, parameter.grad, rtol=0, atol=1e-12)


def across_ranks(rank: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = (sample.chunk(2)[rank].clone().requires_grad_() for sample in (x, y))
    value = distance_correlation(x, y, across_ranks=True)
    value.backward()
    return value.detach(), x.grad, y.grad, distance_covariance(x, y, across_ranks=True).detach()


def test_distance_correlation_across_ranks_equals_one_process() -> None:
    x, y = normal(12, 5), normal(12, 4, seed=1)
    y[:, :2] += x[:, :2] ** 2
    results = run_on_ranks(across_ranks, 2, x, y)
    x.requires_grad_()
    y.requires_grad_()
    value = distance_correlation(x, y)
    value.backward()
    for result in results:
        assert torch.allclose(result[0], value, rtol=0, atol=1e-12)
        assert torch.allclose(result[3], distance_covariance(x, y), rtol=0, atol=1e-12)
    for position, sample in ((1, x), (2, y)):
        mean_over_ranks = (
            torch.cat([result[position] for result in results]) / 2
        )  # the sum over ranks, as DDP divides it
        assert torch.allclose(mean_over_ranks, sample.grad, rtol=0, atol=1e-12)


def sums_over_ranks(rank: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = values[rank].clone().requires_grad_()
    total = collectives.all_reduce_sum(x)
    ((rank + 1) * total.square().sum()).backward()
    half = collectives.all_reduce_sum(torch.full((2,), 0.5 + rank, dtype=torch.bfloat16))
    counts = collectives.all_reduce_sum(torch.tensor([rank + 1]))
    assert torch.equal(x.detach(), values[rank])
    return total.detach(), x.grad, half, counts


def test_all_reduce_sum_and_its_gradient() -> None:
    values = normal(2, 3)
    total = values.sum(0)
    for result, gradient, half, counts in run_on_ranks(sums_over_ranks, 2, values):
        assert torch.allclose(result, total, rtol=0, atol=1e-15)
        assert torch.allclose(gradient, (1 + 2) * 2 * total, rtol=0, atol=1e-14)  # d of both ranks' losses
        assert half.dtype == torch.bfloat16
        assert half.tolist() == [2.0, 2.0]
        assert counts.tolist() == [3]


def gathers_unequal_batches(rank: int) -> str:
    with pytest.raises(ValueError, match=r"the same shape on every rank.*row counts are \[2, 3\]") as error:
        collectives.gather(torch.zeros(2 + rank, 4))
    return str(error.value)


def test_unequal_batches_are_refused_and_not_mixed() -> None:
    messages = run_on_ranks(gathers_unequal_batches, 2)
    assert ["(2, 4)" in messages[0], "(3, 4)" in messages[1]] == [True, True]


def fails_on_one_rank(rank: int) -> int:
    if rank == 1:
        raise LookupError("lost by rank one")
    time.sleep(1)
    return rank


def test_a_failure_on_one_rank_reaches_the_test_and_the_next_call_works() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*fails_on_one_rank.*lost by rank one"):
        run_on_ranks(fails_on_one_rank, 2)
    assert len(run_on_ranks(gathers_every_dtype, 2)) == 2


def takes_from_the_first(rank: int) -> tuple[list[Tensor], Tensor, bool]:
    mine = [torch.tensor([[0, 1], [1, 0]]).to(dtype) if rank == 0 else torch.ones(2, 2).to(dtype) for dtype in DTYPES]
    transposed = (torch.arange(6).view(3, 2) + 10 * rank).T  # not contiguous
    drawn = torch.full((2,), float(rank), requires_grad=True)
    received = collectives.from_first_rank(drawn)
    assert drawn.tolist() == [rank, rank], "the argument is left alone"
    assert received.tolist() == [0, 0]
    return (
        [collectives.from_first_rank(x) for x in mine],
        collectives.from_first_rank(transposed),
        received.requires_grad,
    )


def test_every_rank_has_what_the_first_one_drew() -> None:
    for of_dtypes, transposed, needs_gradient in run_on_ranks(takes_from_the_first, 2):
        for dtype, result in zip(DTYPES, of_dtypes, strict=True):
            assert torch.equal(result, torch.tensor([[0, 1], [1, 0]]).to(dtype))
            assert result.dtype == dtype
        assert transposed.tolist() == [[0, 2, 4], [1, 3, 5]]
        assert not needs_gradient


def test_one_process_has_its_own() -> None:
    x = normal(4, 3).requires_grad_()
    assert torch.equal(collectives.from_first_rank(x), x)
    assert not collectives.from_first_rank(x).requires_grad
