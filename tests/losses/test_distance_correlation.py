"""Distance correlation against dcor, published values, closed forms, a slow loop and its invariances."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcor_values import dcor_value
from mvmr.losses import distance_correlation, distance_covariance
from mvmr.losses.distance_correlation import centred_distances, correlation_of, covariance_of

OPTIONS = [(2, "v"), (1, "v"), (2, "u"), (1, "u")]
REFERENCE = json.loads((Path(__file__).parent / "dcor_reference.json").read_text(encoding="utf-8"))["cases"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def related(n: int, x_dim: int, y_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A pair of samples, the second a noisy non-linear map of the first."""
    x = normal(n, x_dim, seed=seed)
    y = (x @ normal(x_dim, y_dim, seed=seed + 1)).tanh() + 0.3 * normal(n, y_dim, seed=seed + 2)
    return x, y


def slow(x: Tensor, y: Tensor, estimator: str, floor: float = 0.0) -> tuple[float, float]:
    """(dCov^2, R^2) by loops over Eqs. 3 and 5 (or Szekely and Rizzo 2014 for "u"), one entry at a time."""
    n = len(x)

    def centred(rows: Tensor) -> list[list[float]]:
        a = [[max(float(((p - q) ** 2).sum()), floor) ** 0.5 for q in rows] for p in rows]
        if estimator == "u":
            a = [[0.0 if i == j else a[i][j] for j in range(n)] for i in range(n)]
        row = [sum(line) for line in a]
        out = [[0.0] * n for _ in range(n)]
        for i in range(n):
            for j in range(n):
                if estimator == "v":
                    out[i][j] = a[i][j] - row[i] / n - row[j] / n + sum(row) / n**2
                elif i != j:
                    out[i][j] = a[i][j] - (row[i] + row[j]) / (n - 2) + sum(row) / ((n - 1) * (n - 2))
        return out

    def product(a: list[list[float]], b: list[list[float]]) -> float:
        total = sum(a[i][j] * b[i][j] for i in range(n) for j in range(n))
        return total / n**2 if estimator == "v" else total / (n * (n - 3))

    a, b = centred(x), centred(y)
    return product(a, b), product(a, b) / (product(a, a) * product(b, b)) ** 0.5


@pytest.mark.parametrize(("n", "x_dim", "y_dim"), [(4, 1, 2), (5, 3, 1), (37, 40, 3), (130, 1000, 17), (131, 1, 1)])
@pytest.mark.parametrize("duplicates", [False, True])
def test_equals_dcor_in_float64(n: int, x_dim: int, y_dim: int, duplicates: bool) -> None:
    x, y = related(n, x_dim, y_dim)
    if duplicates:
        x[n // 2 :], y[: n // 4] = x[: n - n // 2].clone(), y[:1].clone()
    expected = {
        (2, "v"): dcor_value("distance_correlation_sqr", x, y),
        (1, "v"): dcor_value("distance_correlation", x, y),
        (2, "u"): dcor_value("u_distance_correlation_sqr", x, y),
    }
    for (power, estimator), value in expected.items():
        assert abs(distance_correlation(x, y, power=power, estimator=estimator).item() - value) < 1e-10
    u = expected[2, "u"]
    assert abs(distance_correlation(x, y, power=1, estimator="u") - math.copysign(abs(u) ** 0.5, u)) < 1e-10
    assert abs(distance_covariance(x, y) - dcor_value("distance_covariance_sqr", x, y)) < 1e-10
    unbiased = dcor_value("u_distance_covariance_sqr", x, y)
    assert abs(distance_covariance(x, y, estimator="u") - unbiased) < 1e-10


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case['fn']}-{case['published']}")
def test_equals_published_values(case: dict) -> None:
    halves = [0.0] * 500 + [1.0] * 500
    x, y = (torch.tensor(halves if isinstance(case[k], str) else case[k], dtype=torch.float64) for k in "xy")
    function = distance_covariance if "dcov" in case["fn"] else distance_correlation
    value = function(x, y, estimator="u" if case["fn"].startswith("u_") else "v").item()
    assert value == pytest.approx(case["full_precision"], abs=1e-10)
    assert value == pytest.approx(case["published"], abs=0.6 * 10 ** -case["places"])


@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("floor", [0.0, 2.0])
def test_equals_slow_loop(estimator: str, floor: float) -> None:
    x, y = related(9, 2, 3)
    covariance, correlation = slow(x, y, estimator, floor)
    a, b = (centred_distances(sample, estimator=estimator, floor=floor) for sample in (x, y))
    assert covariance_of(a, b, estimator=estimator).item() == pytest.approx(covariance, abs=1e-12)
    assert correlation_of(a, b, estimator=estimator).item() == pytest.approx(correlation, abs=1e-12)
    assert distance_correlation(x, y, estimator=estimator, floor=floor).item() == pytest.approx(correlation, abs=1e-12)


def test_binary_variables_give_the_squared_phi_coefficient() -> None:
    x = (normal(200, seed=1) > 0.2).double()
    y = torch.where(normal(200, seed=2) > 0.8, 1 - x, x)
    phi = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert torch.allclose(distance_correlation(x, y), phi**2, rtol=0, atol=1e-12)
    assert torch.allclose(distance_correlation(x, y, power=1), phi.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("r", "limit"), [(0.3, 0.07236), (0.8, 0.56987)])
def test_bivariate_normal(r: float, limit: float) -> None:
    """Szekely, Rizzo and Bakirov 2007, Theorem 7; the limits to five places are computed by hand from it."""
    root = math.sqrt(1 - r * r)
    formula = r * math.asin(r) + root - r * math.asin(r / 2) - math.sqrt(4 - r * r) + 1
    formula /= 1 + math.pi / 3 - math.sqrt(3)
    assert formula == pytest.approx(limit, abs=1e-5)
    mix = torch.tensor([[1.0, r], [0.0, root]], dtype=torch.float64)
    pairs = [(normal(300, 2, seed=seed) @ mix).unbind(1) for seed in range(12)]
    for estimator in ("v", "u"):
        mean = sum(distance_correlation(x, y, estimator=estimator).item() for x, y in pairs) / len(pairs)
        assert mean == pytest.approx(formula, abs=0.035)  # the standard error is near 0.01


def test_two_rows_give_one() -> None:
    assert distance_correlation(normal(2, 5), normal(2, 3, seed=1)).item() == pytest.approx(1.0, abs=1e-12)


def test_bias_under_independence() -> None:
    """E[R^2] = [(1 + n / 4 PR_x)(1 + n / 4 PR_z)]^(-1/2), PR the effective dimension; U is near zero."""
    n, x_dim, z_dim = 256, 128, 512
    x, z = normal(n, x_dim, seed=4), normal(n, z_dim, seed=5)
    expected = ((1 + n / (4 * x_dim)) * (1 + n / (4 * z_dim))) ** -0.5
    assert distance_correlation(x, z).item() == pytest.approx(expected, abs=0.01)
    assert abs(distance_correlation(x, z, estimator="u").item()) < 0.02


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    n=st.integers(5, 12),
    dim=st.integers(1, 6),
    log_scale=st.floats(-4, 4),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 10_000),
)
def test_invariances(n: int, dim: int, log_scale: float, shift: float, seed: int) -> None:
    x, y = related(n, dim, 3, seed=seed)
    rotation = torch.linalg.qr(normal(dim, dim, seed=seed + 5)).Q
    similar = 10**log_scale * x @ rotation + shift
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for power, estimator in OPTIONS:
        options = {"power": power, "estimator": estimator}
        value = distance_correlation(x, y, **options)
        assert distance_correlation(x, similar, **options).item() == pytest.approx(1.0, abs=1e-7)
        for other in (
            distance_correlation(y, x, **options),
            distance_correlation(x[order], y[order], **options),
            distance_correlation(similar, y, **options),
            distance_correlation(x.reshape(n, 1, dim, 1), y, **options),
        ):
            assert other.item() == pytest.approx(value.item(), abs=1e-6)
    covariance = 10 ** (log_scale) * distance_covariance(x, y)
    assert distance_covariance(similar, y).item() == pytest.approx(covariance.item(), rel=1e-6)


@pytest.mark.parametrize(("power", "estimator"), OPTIONS)
def test_gradcheck(power: int, estimator: str) -> None:
    x, y = (sample.requires_grad_() for sample in related(6, 3, 2))
    assert torch.autograd.gradcheck(lambda x, y: distance_correlation(x, y, power=power, estimator=estimator), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: distance_covariance(x, y, estimator=estimator), (x, y))


@pytest.mark.parametrize(("power", "estimator"), OPTIONS)
def test_gradcheck_with_duplicate_rows(power: int, estimator: str) -> None:
    x, y = related(7, 3, 2)
    x[1], x[5], y[3] = x[0], x[4], y[2]
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: distance_correlation(x, y, power=power, estimator=estimator), (x, y))


@pytest.mark.parametrize(("power", "estimator"), OPTIONS)
@pytest.mark.parametrize("floor", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_sample_gives_zero_with_zero_gradients(
    power: int, estimator: str, floor: float, dtype: torch.dtype
) -> None:
    x = torch.full((9, 33), 0.1, dtype=dtype) * torch.arange(1, 34, dtype=dtype)
    y = normal(9, 4, dtype=dtype)
    for first, second in ((x, y), (y, x), (x, x)):
        pair = [sample.clone().requires_grad_() for sample in (first, second)]
        value = distance_correlation(*pair, power=power, estimator=estimator, floor=floor)
        value.backward()
        assert value.item() == 0.0
        assert all(torch.equal(sample.grad, torch.zeros_like(sample)) for sample in pair)


def test_equidistant_rows_are_constant_to_the_unbiased_estimator() -> None:
    """U-centring maps equal distances to zero: what remains is rounding, and no ratio may be made of it."""
    one_hot = torch.eye(8)[torch.randperm(8, generator=torch.Generator().manual_seed(0))] * 3.7
    assert distance_correlation(one_hot, normal(8, 3, dtype=torch.float32), estimator="u").item() == 0.0


def test_independent_design_has_finite_gradients_at_zero() -> None:
    x = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    value = distance_correlation(x, torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64), power=1)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    assert x.grad.isfinite().all()


def test_not_a_number_is_not_hidden() -> None:
    x, y = related(6, 3, 2)
    x[2, 1] = math.nan
    assert distance_correlation(x, y).isnan()
    x[2, 1] = math.inf
    assert distance_correlation(x, y, power=1).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: distance_correlation(x, x, power=3), "power must be 2"),
        (lambda x: distance_correlation(x, x, estimator="w"), "estimator must be 'v'"),
        (lambda x: distance_covariance(x, x, estimator="V"), "estimator must be 'v'"),
        (lambda x: distance_correlation(x, x[:3]), "pairs rows"),
        (lambda x: distance_correlation(x[:3], x[:3], estimator="u"), "at least 4 rows"),
        (lambda x: distance_correlation(x[:1], x[:1]), "at least 2 rows"),
        (lambda x: correlation_of(centred_distances(x), centred_distances(x[:3])), "pairs rows"),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(5, 2))
