"""What holds for every hand-crafted representation: shapes, float32, no gradient, no state, one result."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import mvmr.representations
from mvmr.representations import REPRESENTATIONS
from mvmr.types import UserError

HAND_CRAFTED = {name: kind for name, kind in REPRESENTATIONS.items() if not kind.learned}
WIDTHS = {"pixels": 3072, "augmented_pixels": 3072, "scattering": 15552, "hog": 1152, "local_std": 3072}


def digits(count: int, size: int) -> Tensor:
    """Real scans, enlarged, coloured and normalised: [count, 3, size, size]."""
    scans = torch.from_numpy(load_digits().images[:count]).float().unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(scans, size=(size, size), mode="bilinear")
    return (images * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1) - 0.4) / 0.25


def test_alone_as_in_the_readme():
    assert mvmr.representations.HOG(bins=24, cell=8)(digits(2, 32)).shape == (2, 1152)


@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_width_at_32_and_96(name):
    representation = REPRESENTATIONS[name]()
    assert representation(digits(2, 32)).shape == (2, WIDTHS[name])
    assert representation(digits(1, 96)).shape == (1, WIDTHS[name] * 9)


@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_fixed_float32_and_without_gradient(name):
    representation = REPRESENTATIONS[name]()
    images = digits(3, 32)
    expected = representation(images, torch.arange(3), 0)
    assert list(representation.parameters()) == []
    assert representation.state_dict() == {}
    assert torch.equal(REPRESENTATIONS[name]()(images, torch.arange(3), 0), expected)
    assert torch.allclose(representation(images.double()), expected, atol=1e-5)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = representation(images.clone().requires_grad_(), torch.arange(3), 0)
    assert mixed.dtype == torch.float32
    assert not mixed.requires_grad
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_only_what_varies_reads_index_and_epoch(name):
    representation = REPRESENTATIONS[name]()
    images = digits(3, 32)
    first, other = representation(images, torch.arange(3), 0), representation(images, torch.arange(3) + 7, 1)
    assert torch.equal(first, other) == (not representation.varies)
    assert representation.varies == (name == "augmented_pixels")


@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_images_do_not_meet(name):
    """Each image's features are the same alone and in a batch, to float32's rounding; the images stay as they are."""
    representation = REPRESENTATIONS[name]()
    images = digits(5, 32)
    before = images.clone()
    whole = representation(images, torch.arange(5), 2)
    alone = torch.cat([representation(images[i : i + 1], torch.tensor([i]), 2) for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-5)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_images_that_cannot_be_meant_are_refused(name):
    representation = REPRESENTATIONS[name]()
    with pytest.raises(UserError, match="batch of images"):
        representation(digits(1, 32)[0])
    with pytest.raises(UserError, match="uint8"):
        representation(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", HAND_CRAFTED)
def test_cpu_and_gpu_agree_and_repeat(name):
    """Also where float32 products are allowed to be TF32."""
    representation = REPRESENTATIONS[name]().cuda()
    images = digits(4, 32)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        first, again = (representation(images.cuda(), torch.arange(4), 1) for _ in range(2))
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert torch.equal(first, again)
    tolerance = 2e-2 if name == "augmented_pixels" else 1e-4  # the view maker's own resampling may use TF32
    assert torch.allclose(first.cpu(), REPRESENTATIONS[name]()(images, torch.arange(4), 1), atol=tolerance)
