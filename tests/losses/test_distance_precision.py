"""Distance correlation in float32 and half precision: what autocast, TF32, size and offsets must not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvmr.losses import distance_correlation
from mvmr.losses.distance_correlation import centred_distances


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def value_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = distance_correlation(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x, y = normal(64, 300), normal(64, 100, seed=1)
    expected = value_and_gradient(x, y)
    with torch.autocast("cpu", dtype=dtype):
        result = value_and_gradient(x, y)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_of_a_224_pixel_image_does_not_overflow(dtype: torch.dtype) -> None:
    images = normal(8, 3, 224, 224).to(dtype)  # squared norms near 150,000, above float16's 65,504
    z = normal(8, 32, seed=1)
    value, gradient = value_and_gradient(images, z)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert value.item() == pytest.approx(distance_correlation(images.double(), z.double()).item(), abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_float32_is_accurate_far_from_the_origin(offset: float) -> None:
    x, y = normal(64, 8192) + offset, normal(64, 512, seed=1) + offset
    value, gradient = value_and_gradient(x, y)
    expected, expected_gradient = value_and_gradient(x.double(), y.double())
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert error.item() < 1e-4


def test_scales_that_square_out_of_range() -> None:
    x, y = normal(16, 50), normal(16, 20, seed=1)
    expected = distance_correlation(x, y).item()
    for scale in (1e-12, 1e12):
        assert distance_correlation(x * scale, y * scale).item() == pytest.approx(expected, abs=1e-5)


def test_no_tensor_of_pairs_by_features() -> None:
    x = normal(512, 20_000)  # [n, n, F] would take 21 GB
    assert distance_correlation(x, x).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_diagonal_and_equal_rows_are_at_distance_zero(dtype: torch.dtype, tolerance: float) -> None:
    x = normal(130, 8192, dtype=dtype) + 100  # distances near 128
    x[65:] = x[:65].clone()
    centred = centred_distances(x)
    # Entries (i, i) and (i, i + 65) differ by nothing but their distances. Unequal roundings of the same products
    # would give the second a distance near the root of the unit of rounding: 6e-6 in float64.
    assert (centred.diagonal()[:65] - centred.diagonal(65)).abs().max().item() < tolerance
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = exact - exact.mean(0) - exact.mean(1, keepdim=True) + exact.mean()
    assert (centred - exact).abs().max().item() < tolerance


@pytest.fixture
def restored_precision():
    """Puts torch's matmul precision back, through both of its interfaces."""
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        backend.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.filterwarnings("ignore:Please use the new API settings")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_matmul_precision_is_set_aside_and_restored(precision: str) -> None:
    x, y = normal(128, 1024), normal(128, 512, seed=1)
    expected = value_and_gradient(x, y)
    torch.set_float32_matmul_precision(precision)
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    result = value_and_gradient(x, y)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert torch.get_float32_matmul_precision() == precision
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.usefixtures("restored_precision")
def test_precision_set_through_one_backend_alone_is_restored() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    value_and_gradient(normal(8, 4), normal(8, 4, seed=1))
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.cuda.matmul.fp32_precision == "none"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("restored_precision")
@pytest.mark.filterwarnings("ignore:Please use the new API settings")
def test_cuda_with_tf32_allowed_equals_float64() -> None:
    torch.set_float32_matmul_precision("high")
    x, y = normal(256, 8192), normal(256, 4096, seed=1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(x.cuda(), y.cuda())
    expected, expected_gradient = value_and_gradient(x.double(), y.double())
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert ((gradient.cpu() - expected_gradient).norm() / expected_gradient.norm()).item() < 1e-4


def test_compiled_without_a_graph_break() -> None:
    x, y = normal(16, 5), normal(16, 3, seed=1)
    compiled = torch.compile(lambda x: distance_correlation(x, y), backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(distance_correlation(x, y), x)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-7)
