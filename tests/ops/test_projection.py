"""The random projection: linear, unbiased, of the stated variance, and one function of its three numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvmr.ops.projection import Projection


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(projection: Projection) -> Tensor:
    """[F, width]"""
    return projection(torch.eye(projection.features))


@pytest.mark.parametrize(("features", "width"), [(100, 16), (96, 16), (17, 16), (31, 16)])
def test_every_coordinate_goes_to_one_bucket_with_a_sign_and_buckets_are_balanced(features: int, width: int) -> None:
    p = matrix(Projection(features, width))
    assert p.shape == (features, width)
    assert torch.equal(p.abs().sum(1), torch.ones(features))
    assert set(p.unique().tolist()) == {-1.0, 0.0, 1.0}
    sizes = p.abs().sum(0)
    assert sizes.max() - sizes.min() <= 1


def test_it_is_linear_and_equals_its_matrix() -> None:
    projection, x, y = Projection(300, 32, 5), normal(7, 300), normal(7, 300, seed=1)
    assert torch.allclose(projection(2 * x - 3 * y), 2 * projection(x) - 3 * projection(y), atol=1e-4)
    assert torch.allclose(projection(x), x @ matrix(projection), atol=1e-5)


def test_squared_norms_are_unbiased_with_a_variance_of_two_over_width() -> None:
    x = normal(1, 2048)
    x = x / x.norm()
    width, seeds = 64, 600
    squares = torch.cat([Projection(2048, width, seed)(x).square().sum(1) for seed in range(seeds)])
    error = (2 / width / seeds) ** 0.5
    assert abs(squares.mean() - 1) < 4 * error
    assert 0.8 < squares.var() * width / 2 < 1.25


def test_signs_are_balanced_and_seeds_differ() -> None:
    p, other = (matrix(Projection(4000, 16, seed)) for seed in (0, 1))
    assert abs(p.sum()) < 4 * 4000**0.5
    assert ((p * other).sum() / 4000).abs() < 0.1
    assert (p != other).any()


def test_it_is_a_function_of_its_three_numbers_and_of_no_batch() -> None:
    x = normal(9, 500)
    projected = Projection(500, 64, 3)(x)
    torch.manual_seed(1)
    again = Projection(500, 64, 3)
    assert torch.equal(torch.cat([again(x[:4]), again(x[4:5]), again(x[5:])]), projected)


def test_it_is_the_identity_where_nothing_has_to_be_saved() -> None:
    x = normal(3, 20)
    for width in (20, 21, 4096):
        projection = Projection(20, width)
        assert projection.is_identity
        assert projection.width == 20
        assert torch.equal(projection(x), x)
    assert Projection(20, 20)(x.double()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_comes_back_as_float32(dtype: torch.dtype) -> None:
    x = normal(3, 200).to(dtype)
    projected = Projection(200, 16)(x)
    assert projected.dtype == torch.float32
    assert torch.allclose(projected, Projection(200, 16)(x.float()), atol=1e-5)


def test_no_rows() -> None:
    assert Projection(200, 16)(torch.empty(0, 200)).shape == (0, 16)


@pytest.mark.parametrize(("features", "width"), [(0, 4), (4, 0)])
def test_sizes_are_checked(features: int, width: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Projection(features, width)
    with pytest.raises(ValueError, match=r"\[B, 20\]"):
        Projection(20, 4)(torch.zeros(2, 21))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    x, projection = normal(33, 5000), Projection(5000, 128)
    assert torch.equal(projection(x.cuda()).cpu(), projection(x))
    assert torch.equal(projection(x), Projection(5000, 128)(x))
