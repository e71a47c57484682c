from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mvmr.representations import Scattering, scattering
from mvmr.types import UserError


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("J", "L", "order", "height", "width"),
    [
        (2, 8, 2, 32, 32),
        (2, 8, 1, 32, 32),
        (2, 8, 0, 16, 16),
        (1, 8, 2, 9, 12),
        (3, 6, 2, 33, 41),  # no multiples of 2^J, odd
        (2, 8, 2, 30, 18),
        (2, 5, 2, 4, 7),  # a side of 2^J: padded by its whole length
        (3, 3, 2, 8, 8),
        (4, 2, 2, 35, 20),
        (2, 8, 1, 96, 96),
    ],
)
def test_equals_kymatio(J, L, order, height, width):
    # The package's public import fails with recent versions of SciPy; this one does not.
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

    images = noise(2, 3, height, width)
    expected = ScatteringTorch2D(J=J, shape=(height, width), L=L, max_order=order)(images)
    module = Scattering(J=J, L=L, order=order)
    maps = module.maps(images)
    expected = expected[:, :, : module.channels]  # there, order 0 computes order 1 too
    assert maps.shape == expected.shape == (2, 3, module.channels, height >> J, width >> J)
    assert (maps - expected).abs().max() < 1e-5
    assert torch.equal(module(images), maps.flatten(1))


def test_channels():
    assert [Scattering(order=order).channels for order in (0, 1, 2)] == [1, 17, 81]
    assert Scattering(J=3, L=4).channels == 1 + 12 + 48


def test_order_zero_is_the_low_pass_image():
    """Direct sums with the Gaussian of width 1.6 over the padded, periodic image, at every fourth pixel."""
    image = noise(1, 1, 16, 16)
    reach = np.arange(-12, 13)
    gaussian = np.exp(-(reach**2) / (2 * 1.6**2)) / math.sqrt(2 * math.pi * 1.6**2)
    padded = np.pad(np.pad(image[0, 0].double().numpy(), 4, mode="reflect"), 8, mode="wrap")
    expected = np.array([[gaussian @ padded[r : r + 25, c : c + 25] @ gaussian for c in range(0, 16, 4)]
                         for r in range(0, 16, 4)])  # fmt: skip
    for order in (0, 2):
        maps = Scattering(order=order).maps(image)
        assert np.abs(maps[0, 0, 0].numpy() - expected).max() < 5e-5  # 3.1415 in place of pi is 3e-5 of the value


def test_shift_by_four_pixels_moves_the_maps_by_one():
    blob = torch.zeros(1, 3, 64, 64)
    blob[..., 26:34, 24:36] = noise(1, 3, 8, 12)
    maps, shifted = Scattering().maps(blob), Scattering().maps(blob.roll((4, -8), (2, 3)))
    assert maps.abs().max() > 0.1
    assert torch.allclose(shifted[..., 2:-2, 2:-2], maps.roll((1, -2), (3, 4))[..., 2:-2, 2:-2], atol=1e-5)


def test_constants_pass_order_zero_alone():
    maps = Scattering().maps(torch.full((1, 1, 32, 32), 2.0))
    assert torch.allclose(maps[:, :, 0], torch.tensor(2.0), atol=2e-4)
    assert maps[:, :, 1:].abs().max() < 1e-5


def test_quarter_turn_turns_the_angles():
    """theta + 90 degrees is four of eight angles on; psi and its mirror image have one modulus for real images."""
    images = noise(1, 1, 32, 32)
    padded = torch.zeros(1, 1, 65, 65)
    padded[..., 16:48, 16:48] = images  # odd, so that a turn keeps the sampling grid
    maps, turned = Scattering(J=1).maps(padded), Scattering(J=1).maps(padded.rot90(1, (2, 3)))
    energy, energy_turned = (m[0, 0, 1:].square().sum((1, 2)) for m in (maps, turned))  # [8]
    assert torch.allclose(energy_turned, energy.roll(4), rtol=0.05)
    assert not torch.allclose(energy_turned, energy, rtol=0.05)


def test_chunks_do_not_show(monkeypatch):
    images = noise(3, 3, 16, 16)
    whole = Scattering().maps(images)
    monkeypatch.setattr(scattering, "CPU_CHUNK", 1)
    assert torch.allclose(Scattering().maps(images), whole, atol=1e-6)


def test_settings_and_sizes_out_of_range():
    with pytest.raises(UserError, match=r"scattering\.J"):
        Scattering(J=3)(torch.zeros(1, 3, 7, 32))
    with pytest.raises(UserError, match="order"):
        Scattering(order=3)
    with pytest.raises(UserError, match="J >= 1"):
        Scattering(J=0)
