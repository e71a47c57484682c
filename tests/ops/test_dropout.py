"""Dropout's masks: rates, independence, and that they are a function of image and key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvmr.ops.dropout import dropout_key, dropped, kept_units
from ranks import run_on_ranks

KEY = torch.tensor([12345, 678])


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5])
def test_units_are_dropped_at_the_rate(rate: float) -> None:
    kept = kept_units(KEY, torch.arange(400), 3, width=250, rate=rate)
    assert kept.shape == (400, 250)
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean().item() - rate) <= 4 * deviation
    if rate == 0.5:  # rows and columns are independent: their sums spread as binomials do
        for axis, count in ((0, 400), (1, 250)):
            assert kept.double().mean(axis).std().item() == pytest.approx((0.25 / count) ** 0.5, rel=0.15)


def test_masks_are_a_function_of_image_key_and_stream() -> None:
    index = torch.tensor([7, 1, 99, 1 << 33])
    kept = kept_units(KEY, index, 2, width=64, rate=0.5)
    order = torch.tensor([3, 0, 2, 1])
    assert torch.equal(kept_units(KEY, index[order], 2, width=64, rate=0.5), kept[order])
    assert torch.equal(kept_units(KEY, index[1:2], 2, width=64, rate=0.5), kept[1:2])
    assert torch.equal(kept_units(KEY, index, 2, width=30, rate=0.5), kept[:, :30])
    for other in (
        kept_units(KEY + 1, index, 2, width=64, rate=0.5),
        kept_units(KEY, index, 3, width=64, rate=0.5),
        kept_units(KEY, index + 1, 2, width=64, rate=0.5),
    ):
        assert 0.3 < (other == kept).double().mean() < 0.7
    assert torch.equal(
        kept_units(KEY, index, 2, width=64, rate=0.2) | kept, kept_units(KEY, index, 2, width=64, rate=0.2)
    )


def test_mean_is_kept() -> None:
    x = torch.full((50, 1000), 2.0, dtype=torch.float64)
    kept = kept_units(KEY, torch.arange(50), 0, width=1000, rate=0.1)
    y = dropped(x, kept, 0.1)
    assert y.unique().tolist() == pytest.approx([0, 2 / 0.9])
    assert y.mean().item() == pytest.approx(2.0, rel=0.01)
    assert dropped(x.bfloat16(), kept, 0.1).dtype == torch.bfloat16


def key_of(rank: int) -> Tensor:
    torch.manual_seed(rank)
    return dropout_key(torch.device("cpu"))


def test_key_is_drawn_by_the_seed_and_equal_on_ranks() -> None:
    first, again, other = key_of(0), key_of(0), key_of(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.int64
    assert all(torch.equal(found, first) for found in run_on_ranks(key_of, 2))


@pytest.mark.gpu
def test_masks_on_a_gpu_are_those_on_the_cpu() -> None:
    index = torch.arange(100)
    on_gpu = kept_units(KEY.cuda(), index, 5, width=200, rate=0.1)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), kept_units(KEY, index, 5, width=200, rate=0.1))


def test_refuses_a_rate_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 1.0"):
        kept_units(KEY, torch.arange(2), 0, width=4, rate=1.0)
