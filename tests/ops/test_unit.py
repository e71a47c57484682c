"""Rows of norm 1, whatever precision they come in."""

from __future__ import annotations

import pytest
import torch

from mvmr.ops.unit import unit


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_rows_have_norm_1_in_float32_at_least(given: torch.dtype, expected: torch.dtype) -> None:
    x = 30 * torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    found = unit(x.to(given))
    assert found.dtype == expected
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=expected))
    torch.testing.assert_close((found * x).sum(1), x.norm(dim=1).to(expected), rtol=1e-2, atol=0.0, check_dtype=False)


def test_a_row_of_zeros_stays_one() -> None:
    assert not unit(torch.zeros(2, 3)).any()
