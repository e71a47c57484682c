from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import generic_filter

from mvmr.representations import LocalStd
from mvmr.types import UserError


def expected(image: np.ndarray, size: int) -> np.ndarray:
    """SciPy's own moving standard deviation, in float64."""
    return np.sqrt(generic_filter(image.astype(np.float64), np.var, size=size, mode="mirror") + 1e-8)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(3, 14), width=st.integers(3, 14), size=st.sampled_from([3, 5]), offset=st.floats(-50, 50))
def test_equals_scipy(height, width, size, offset):
    generator = torch.Generator().manual_seed(height * 100 + width)
    images = torch.randn(1, 2, height, width, generator=generator) + offset
    maps = LocalStd(size=size).maps(images)
    for colour in range(2):
        assert np.abs(maps[0, colour].numpy() - expected(images[0, colour].numpy(), size)).max() < 1e-5


def test_flat_and_far_from_zero_gives_the_floor():
    """E[x^2] - E[x]^2 in float32 would give about 0.1 here."""
    maps = LocalStd().maps(torch.full((1, 3, 8, 8), 321.123))
    assert torch.allclose(maps, torch.tensor(1e-4), rtol=1e-6, atol=0)


def test_flat_patch_beside_a_bright_one():
    images = torch.zeros(1, 1, 8, 8)
    images[..., 4:] = 200.0
    maps = LocalStd().maps(images)[0, 0]
    assert torch.allclose(maps[:, :3], torch.tensor(1e-4))
    assert torch.allclose(maps[:, 5:], torch.tensor(1e-4))
    assert maps[4, 4] == pytest.approx(200 * (2 / 9) ** 0.5, rel=1e-5)


def test_settings_and_sizes_out_of_range():
    with pytest.raises(UserError, match="odd size"):
        LocalStd(size=4)
    with pytest.raises(UserError, match=r"local_std\.size"):
        LocalStd(size=5)(torch.zeros(1, 3, 2, 8))
