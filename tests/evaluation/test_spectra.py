"""Spectra of known power laws, scatters of known size, points on a circle: what each number must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from mvmr.evaluation import spectra
from mvmr.evaluation.diagnostics import rankme
from mvmr.evaluation.spectra import (
    alignment,
    alpha_req,
    covariance_spectrum,
    dimension_std,
    effective_dimension,
    entropy_rank,
    lidar,
    power_law,
    uniformity,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def turn(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q


def with_covariance(values: Tensor, images: int = 400) -> Tensor:
    """Features [N, D] with exactly these eigenvalues of the covariance, and a mean of zero."""
    drawn = torch.randn(images, len(values) + 1, dtype=torch.float64)
    drawn[:, 0] = 1
    rows = torch.linalg.qr(drawn).Q[:, 1:]  # orthonormal, and orthogonal to the constant
    return rows @ torch.diag((images * values).sqrt()) @ turn(len(values))


def law(exponent: float, dim: int = 150) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64) ** -exponent


def entropy_of(values: Tensor) -> float:
    p = (values / values.sum()).tolist()
    return math.exp(-sum(q * math.log(q) for q in p if q > 0))


# ---- the spectrum of the covariance


def test_the_spectrum_is_that_of_numpys_covariance() -> None:
    x = torch.randn(50, 20) @ torch.randn(20, 20) + 5
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(covariance_spectrum(x).numpy(), expected, rtol=1e-9)
    few = covariance_spectrum(x[:8])  # fewer images than dimensions
    assert few.shape == (8,)
    expected = np.linalg.eigvalsh(np.cov(x[:8].double().numpy().T, bias=True))[::-1][:7]
    np.testing.assert_allclose(few[:7].numpy(), expected, rtol=1e-9)
    assert few[7] == 0


def test_what_is_rounding_in_the_spectrum_is_zero() -> None:
    x = torch.randn(300, 6) @ torch.randn(6, 40)  # rank 6, in float32
    assert int((covariance_spectrum(x) > 0).sum()) == 6
    assert int((covariance_spectrum(x + 1e-4 * torch.randn(300, 40)) > 0).sum()) == 40
    exact = torch.randn(300, 6).double() @ torch.randn(6, 40).double()
    assert int((covariance_spectrum(exact) > 0).sum()) == 6
    constant = torch.full((100, 3), 0.1) * (1 + 1e-8 * torch.randn(100, 1))
    assert covariance_spectrum(constant + 1000).sum() == 0
    assert covariance_spectrum(torch.zeros(9, 4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7])
def test_alpha_of_exact_power_laws(exponent: float) -> None:
    x = with_covariance(3.0 * law(exponent))
    found = alpha_req(x)
    assert found is not None
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.r2 == pytest.approx(1.0, abs=1e-6)
    moved = alpha_req(7 * x @ turn(150) + torch.randn(150, dtype=torch.float64))
    assert moved is not None
    assert moved.exponent == pytest.approx(exponent, abs=1e-9)
    single = alpha_req(x.float())
    assert single is not None
    assert single.exponent == pytest.approx(exponent, abs=1e-4)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.5])
def test_ranks_of_exact_power_laws(exponent: float) -> None:
    values = law(exponent, dim=30)
    x = with_covariance(values)  # centred, so its singular values are the roots of these
    assert rankme(x) == pytest.approx(entropy_of(values.sqrt()), rel=1e-4)
    expected = values.sum().item() ** 2 / (values**2).sum().item()
    assert effective_dimension(x) == pytest.approx(expected, rel=1e-9)
    if exponent == 0:
        assert rankme(x) == pytest.approx(30, rel=1e-4)
        assert effective_dimension(x) == pytest.approx(30)


def test_the_fit_is_weighted_least_squares() -> None:
    spectrum = (law(1.2) * torch.exp(0.3 * torch.randn(150, dtype=torch.float64))).sort(descending=True).values
    ranks = np.arange(6, 101)
    x, y = np.log(ranks)[:, None], np.log(spectrum[5:100].numpy())
    reference = LinearRegression().fit(x, y, sample_weight=1 / ranks)
    found = power_law(spectrum)
    assert found is not None
    assert found.exponent == pytest.approx(-reference.coef_[0], rel=1e-9)
    assert found.r2 == pytest.approx(reference.score(x, y, sample_weight=1 / ranks), rel=1e-9)
    assert found.r2 < 0.999
    changed = spectrum.clone()
    changed[:5] *= 1000
    changed[100:] *= 1e-3
    assert power_law(changed) == found  # what lies outside of the ranks does not count
    assert power_law(changed, first=1, last=150) != found
    narrow = power_law(spectrum, first=20, last=40)
    assert narrow is not None
    weights = np.sqrt(1 / np.arange(20, 41))
    expected = np.polyfit(np.log(np.arange(20, 41)), np.log(spectrum[19:40].numpy()), 1, w=weights)
    assert narrow.exponent == pytest.approx(-expected[0], rel=1e-9)


def test_too_few_directions_have_no_alpha() -> None:
    assert alpha_req(with_covariance(law(1.0, dim=9))) is None
    assert alpha_req(with_covariance(law(1.0, dim=10))) is not None
    flat_tail = torch.cat([law(1.0, dim=20), torch.zeros(80)])
    assert power_law(flat_tail) == power_law(law(1.0, dim=20))
    assert alpha_req(torch.ones(30, 64)) is None


def test_effective_dimension_of_lines_and_points() -> None:
    line = torch.randn(60, 1, dtype=torch.float64) * torch.randn(1, 8, dtype=torch.float64)
    assert effective_dimension(line + 100) == pytest.approx(1.0)
    assert effective_dimension(torch.full((20, 4), 0.3)) == 0.0
    assert effective_dimension(torch.eye(7)) == pytest.approx(6.0)  # a regular simplex


def test_deviations_are_of_each_dimension() -> None:
    x = torch.randn(40, 5) * torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]) + 7
    np.testing.assert_allclose(dimension_std(x).numpy(), x.double().numpy().std(axis=0), rtol=1e-12)


def test_entropy_rank_of_nothing() -> None:
    assert entropy_rank(torch.zeros(3)) == 0.0
    assert math.isnan(entropy_rank(torch.tensor([1.0, math.inf])))


# ---- LiDAR


def scatters(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Between and within, one outer product at a time."""
    images, views, dim = x.shape
    rows = x.double().numpy()
    means = [sum(rows[i]) / views for i in range(images)]
    mean = sum(means) / images
    between, within = np.zeros((dim, dim)), np.zeros((dim, dim))
    for i in range(images):
        between += np.outer(means[i] - mean, means[i] - mean) / images
        for j in range(views):
            within += np.outer(rows[i, j] - means[i], rows[i, j] - means[i]) / (images * views)
    return between, within


def test_lidar_by_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(12, 1, 5) @ torch.randn(5, 5) + 0.5 * torch.randn(12, 7, 5) @ torch.randn(5, 5) + 3
    between, within = scatters(x)
    within += 1e-4 * np.eye(5)
    root = np.linalg.inv(scipy.linalg.sqrtm(within).real)
    values = np.linalg.eigvalsh(root @ between @ root)
    p = values / values.sum() + 1e-7
    expected = math.exp(-(p * np.log(p)).sum())
    assert 1.2 < expected < 4.8
    assert lidar(x) == pytest.approx(expected, rel=1e-6)
    generalised = scipy.linalg.eigh(between, within, eigvals_only=True)
    assert lidar(x) == pytest.approx(entropy_rank(torch.from_numpy(generalised)), rel=1e-6)
    assert lidar(x, delta=1.0) != pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(spectra, "BLOCK", 1)
    assert lidar(x) == pytest.approx(expected, rel=1e-6)


def known_scatter(between: list[float], within: list[float]) -> Tensor:
    """Views [2 D, 2 D, D] with S_b = diag(between^2) / D and S_w = diag(within^2) / D: along one axis at a time."""
    dim = len(between)
    signs = torch.cat([torch.eye(dim), -torch.eye(dim)]).double()  # [2 D, D]
    means, moves = signs * torch.tensor(between), signs * torch.tensor(within)
    return means[:, None] + moves[None]


def test_lidar_of_known_scatter() -> None:
    even = known_scatter([1.0] * 6, [0.5] * 6)
    assert lidar(even) == pytest.approx(6, rel=1e-4)
    turned = even @ turn(6) + torch.randn(6, dtype=torch.float64)
    assert lidar(turned) == pytest.approx(6, rel=1e-4)
    between, within = [3.0, 2.0, 1.0, 0.5], [0.1, 0.2, 0.4, 0.0]
    values = torch.tensor([b**2 / 4 / (w**2 / 4 + 0.01) for b, w in zip(between, within, strict=True)])
    x = known_scatter(between, within)
    assert lidar(x, delta=0.01) == pytest.approx(entropy_of(values), rel=1e-4)
    # Between and within in proportion: every direction counts alike, whatever its size.
    assert lidar(known_scatter([9.0, 3.0, 1.0], [0.9, 0.3, 0.1]), delta=1e-12) == pytest.approx(3, rel=1e-4)


def test_lidar_leaves_out_what_differs_by_view_alone() -> None:
    """The noise of views fills RankMe's spectrum and not LiDAR's."""
    signal = torch.randn(200, 1, 2, dtype=torch.float64).expand(-1, 20, -1)
    noise = torch.randn(200, 20, 30, dtype=torch.float64)
    x = torch.cat([50 * signal, noise], dim=2)
    assert lidar(x) < 2.2
    assert rankme((x / dimension_std(x.flatten(0, 1))).flatten(0, 1)) > 28


def test_lidar_at_its_limits() -> None:
    few = torch.randn(4, 5, 10, dtype=torch.float64)
    assert lidar(few) < 3 + 1e-3  # n - 1 directions between four means
    same = torch.randn(1, 6, 8).expand(5, -1, -1)
    assert lidar(same) == 0.0
    assert lidar(same + 1e-8 * torch.randn(5, 1, 1)) == 0.0
    assert math.isnan(lidar(torch.full((3, 2, 2), math.nan)))
    for wrong in (torch.zeros(3, 4), torch.zeros(3, 1, 4)):
        with pytest.raises(ValueError, match=r"are \[n, q, D\], and these are"):
            lidar(wrong)
    with pytest.raises(ValueError, match="delta is 0"):
        lidar(few, delta=0)


# ---- uniformity and alignment


def circle(points: int) -> Tensor:
    angles = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_uniformity_of_points_on_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uniformity(circle(2)) == pytest.approx(-8.0)
    assert uniformity(circle(4)) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    # The mean over the whole circle is exp(-2 t) I_0(2 t), the pairs of a point with itself included.
    for t in (0.5, 2.0):
        whole = math.exp(-2 * t) * scipy.special.i0(2 * t)
        assert uniformity(circle(64), t=t) == pytest.approx(math.log((64 * whole - 1) / 63), rel=1e-9)
    lengths = torch.rand(64, 1, dtype=torch.float64) + 0.5
    assert uniformity(circle(64) * lengths) == pytest.approx(uniformity(circle(64)))
    monkeypatch.setattr(spectra, "BLOCK", 200)
    assert uniformity(circle(64)) == pytest.approx(math.log((64 * math.exp(-4) * scipy.special.i0(4) - 1) / 63))


def test_uniformity_is_the_papers_on_drawn_points() -> None:
    x = torch.randn(80, 6)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log().item()
    assert uniformity(x) == pytest.approx(expected, rel=1e-9)
    assert uniformity(torch.ones(5, 3) * torch.arange(1, 6)[:, None]) == pytest.approx(0.0, abs=1e-12)
    zero = torch.cat([torch.zeros(1, 2), circle(2).float()])  # |0 - u|^2 is 1
    assert uniformity(zero) == pytest.approx(math.log((2 * math.exp(-2) + math.exp(-8)) / 3), rel=1e-6)
    assert math.isnan(uniformity(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
    with pytest.raises(ValueError, match="pairs of rows"):
        uniformity(torch.ones(1, 3))


def test_alignment_of_views_at_known_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.tensor([[[1.0, 0.0], [5.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]], [[1.0, 1.0], [-3.0, -3.0]]])
    assert [alignment(views[i : i + 1]) for i in range(3)] == pytest.approx([0.0, 2.0, 4.0])
    assert alignment(views) == pytest.approx(2.0)
    assert alignment(views, power=1) == pytest.approx((0 + math.sqrt(2) + 2) / 3)
    x = torch.randn(9, 4, 5)
    unit = torch.nn.functional.normalize(x.double(), dim=2)
    pairs = [(unit[:, a] - unit[:, b]).norm(dim=1) ** 2 for a in range(4) for b in range(a)]
    assert alignment(x) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-9)
    monkeypatch.setattr(spectra, "BLOCK", 1)
    assert alignment(x) == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-9)
    with pytest.raises(ValueError, match="two or more views"):
        alignment(x[:, :1])


def test_what_is_not_finite_shows() -> None:
    x = torch.randn(20, 12)
    x[3, 4] = math.inf
    found = alpha_req(x)
    assert found is not None
    assert math.isnan(found.exponent)
    assert math.isnan(effective_dimension(x))
