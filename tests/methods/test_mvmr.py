"""MV-MR's objective against loops written from the paper's equations, for every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcor_values import dcor_value
from mvmr.methods.mvmr import MVMR, MVMRConfig
from mvmr.types import Batch, Step

B, D = 9, 5
STEP = Step(0, 1, 1)


def distances(x: Tensor, floor: float = 0.0) -> list[list[float]]:
    squared = [[float(((x[i] - x[j]) ** 2).sum()) for j in range(len(x))] for i in range(len(x))]
    return [[math.sqrt(max(value, floor)) for value in row] for row in squared]


def double_centred(a: list[list[float]]) -> list[list[float]]:
    n = len(a)
    rows = [sum(row) / n for row in a]
    total = sum(rows) / n
    return [[a[i][j] - rows[i] - rows[j] + total for j in range(n)] for i in range(n)]


def covariance(a: list[list[float]], b: list[list[float]]) -> float:
    n = len(a)
    return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n)) / n**2


def squared_correlation(x: Tensor, y: Tensor, floor: float = 0.0) -> float:
    """Eq. 3 with the radical that 0 <= dCor <= 1 forces: dCov^2 / sqrt(dVar dVar)."""
    a, b = double_centred(distances(x, floor)), double_centred(distances(y, floor))
    return covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b))


def hinge(z: Tensor, epsilon: float) -> float:
    """Eq. 7 and 8."""
    total = 0.0
    for d in range(z.shape[1]):
        column = [float(value) for value in z[:, d]]
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / (len(column) - 1)
        total += max(0.0, 1.0 - math.sqrt(variance + epsilon))
    return total / z.shape[1]


def mean_square(z1: Tensor, z2: Tensor, *, over_dimensions: bool) -> float:
    """Eq. 6."""
    total = sum(float((z1[i, d] - z2[i, d]) ** 2) for i in range(len(z1)) for d in range(z1.shape[1]))
    return total / len(z1) / (z1.shape[1] if over_dimensions else 1)


@pytest.fixture
def inputs() -> tuple[dict[str, Tensor], Batch]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    plain = 0.7 * normal(B, D)
    embeddings = {"plain": plain, "augmented": plain + 0.3 * normal(B, D)}
    features = {"pixels": normal(B, 12), "hog": 0.02 * normal(B, 7)}
    return embeddings, Batch(torch.arange(B), {}, features)


def objective(inputs: tuple[dict[str, Tensor], Batch], **settings: Any) -> dict[str, Tensor]:
    method = MVMR(nn.Identity(), D, MVMRConfig.model_validate({"projector": [4], **settings}))
    return method.objective(inputs[0], inputs[1], STEP)


def test_paper_preset_is_equation_12(inputs: tuple[dict[str, Tensor], Batch]) -> None:
    z, augmented = inputs[0]["plain"], inputs[0]["augmented"]
    l1 = mean_square(z, augmented, over_dimensions=True) + hinge(z, 1e-4) + hinge(augmented, 1e-4)
    l2 = 1 - squared_correlation(augmented, z)
    l3 = sum(1 - squared_correlation(augmented, x) for x in inputs[1].representations.values())
    terms = objective(inputs)
    assert terms["loss"].item() == pytest.approx(l1 + l2 + l3, abs=1e-12)
    assert terms["dcor/views"].item() == pytest.approx(1 - l2, abs=1e-12)


def test_official_preset_is_what_the_released_code_computes(inputs: tuple[dict[str, Tensor], Batch]) -> None:
    z, augmented = inputs[0]["plain"], inputs[0]["augmented"]
    pixels, hog = inputs[1].representations["pixels"], inputs[1].representations["hog"]

    def r(x: Tensor, y: Tensor) -> float:
        return math.sqrt(squared_correlation(x, y, floor=1e-4))

    l1 = mean_square(z, augmented, over_dimensions=True) + hinge(z, 0.0) + hinge(augmented, 0.0)
    l2 = 1 - r(augmented / 32, z / 32)
    l3 = r(augmented / 32, pixels / 32) + r(augmented / 32, hog)  # added, and HOG is not divided
    assert objective(inputs, preset="official")["loss"].item() == pytest.approx(l1 + l2 + l3, abs=1e-10)


@pytest.mark.parametrize(
    "weights", [{"invariance": 3.0}, {"variance": 2.0}, {"alpha": 0.5}, {"beta": {"pixels": 0.0, "hog": 4.0}}]
)
def test_weights_weigh_their_terms(weights: dict[str, Any], inputs: tuple[dict[str, Tensor], Batch]) -> None:
    terms = {key: value.item() for key, value in objective(inputs, **weights).items()}
    beta = weights.get("beta", {})
    expected = (
        weights.get("invariance", 1.0) * terms["invariance"] + weights.get("variance", 1.0) * terms["variance"]
        + weights.get("alpha", 1.0) * (1 - terms["dcor/views"])
        + sum(beta.get(name, 1.0) * (1 - terms[f"dcor/{name}"]) for name in ("pixels", "hog"))
    )  # fmt: skip
    assert terms["loss"] == pytest.approx(expected, abs=1e-12)


def test_summed_distance_is_d_times_the_mean(inputs: tuple[dict[str, Tensor], Batch]) -> None:
    mean, total = (objective(inputs, mse_reduction=how)["invariance"].item() for how in ("mean", "sum"))
    assert total == pytest.approx(D * mean, rel=1e-12)


def test_unbiased_estimator_is_dcor_s(inputs: tuple[dict[str, Tensor], Batch]) -> None:
    terms = objective(inputs, estimator="u")
    expected = dcor_value("u_distance_correlation_sqr", inputs[0]["augmented"], inputs[1].representations["hog"])
    assert terms["dcor/hog"].item() == pytest.approx(expected, abs=1e-10)


def test_gradient_reaches_both_views_but_l3_only_the_augmented(inputs: tuple[dict[str, Tensor], Batch]) -> None:
    """Section 1(a): L1 and L2 move both embeddings, L3 the augmented one alone; representations are constants."""
    embeddings = {name: z.clone().requires_grad_() for name, z in inputs[0].items()}
    objective((embeddings, inputs[1]), invariance=0, variance=0, alpha=0)["loss"].backward()
    assert embeddings["augmented"].grad is not None
    assert embeddings["augmented"].grad.abs().sum() > 0
    assert embeddings["plain"].grad is None or embeddings["plain"].grad.abs().sum() == 0
    objective((embeddings, inputs[1]), beta={"pixels": 0.0, "hog": 0.0})["loss"].backward()
    assert embeddings["plain"].grad is not None
    assert embeddings["plain"].grad.abs().sum() > 0


def test_teacher_equal_to_the_embedding_costs_nothing(inputs: tuple[dict[str, Tensor], Batch]) -> None:
    embeddings, _ = inputs
    rotated = 3 * embeddings["augmented"].flip(1) + 7  # a permutation of axes, a scale and a shift
    batch = Batch(torch.arange(B), {}, {"teacher": rotated})
    assert objective((embeddings, batch))["dcor/teacher"].item() == pytest.approx(1, abs=1e-12)


def test_views_pass_apart_through_batch_norm() -> None:
    """Two forward passes: each view is normalised by its own statistics."""
    method = MVMR(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), 12, MVMRConfig(projector=()))
    plain = torch.randn(8, 3, 2, 2)
    batch = Batch(torch.arange(8), {"plain": plain[None], "global": 5 + 9 * plain[None]}, {})
    embeddings = method.embed(batch)
    torch.testing.assert_close(embeddings["plain"], embeddings["augmented"], rtol=1e-4, atol=1e-4)


def test_projector_is_the_paper_s() -> None:
    method = MVMR(nn.Identity(), 512, MVMRConfig())
    shapes = [tuple(m.weight.shape) for m in method.projector if isinstance(m, nn.Linear)]
    assert shapes == [(8192, 512), (8192, 8192), (8192, 8192)]
    assert all(m.bias is None for m in method.projector if isinstance(m, nn.Linear))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in method.projector) == 2
    assert isinstance(method.projector[-1], nn.Linear)
