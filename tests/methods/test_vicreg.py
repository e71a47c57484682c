"""VICReg's objective against Eqs. 1 to 6 written as loops, its options and its layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mvmr.methods.vicreg import VICReg, VICRegConfig
from mvmr.types import Batch, Step

B, D = 7, 5
STEP = Step(0, 1, 1)
BATCH = Batch(torch.arange(B), {}, {})


def covariance(z: Tensor, i: int, j: int) -> float:
    """Eq. 3, element i, j."""
    x, y = ([float(value) for value in z[:, k]] for k in (i, j))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (len(x) - 1)


def hinge(z: Tensor) -> float:
    """Eqs. 1 and 2."""
    width = z.shape[1]
    return sum(max(0.0, 1.0 - math.sqrt(covariance(z, i, i) + 1e-4)) for i in range(width)) / width


def penalty(z: Tensor) -> float:
    """Eq. 4."""
    width = z.shape[1]
    return sum(covariance(z, i, j) ** 2 for i in range(width) for j in range(width) if i != j) / width


def distance(z1: Tensor, z2: Tensor) -> float:
    """Eq. 5."""
    return sum(float((z1[i, d] - z2[i, d]) ** 2) for i in range(len(z1)) for d in range(z1.shape[1])) / len(z1)


@pytest.fixture
def embeddings() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = 0.7 * torch.randn(B, D, generator=generator, dtype=torch.float64)
    return {"first": first, "second": first + 0.3 * torch.randn(B, D, generator=generator, dtype=torch.float64)}


def objective(embeddings: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    method = VICReg(nn.Identity(), D, VICRegConfig.model_validate({"expander": [4], **settings}))
    return method.objective(embeddings, BATCH, STEP)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", D), ("sum", 1)])
@pytest.mark.parametrize(("halve", "share"), [(False, 1.0), (True, 0.5)])
def test_loss_is_equation_6(
    reduction: str, divisor: int, halve: bool, share: float, embeddings: dict[str, Tensor]
) -> None:
    z1, z2 = embeddings["first"], embeddings["second"]
    s, v, c = distance(z1, z2) / divisor, share * (hinge(z1) + hinge(z2)), penalty(z1) + penalty(z2)
    assert min(s, v, c) > 0.05
    terms = objective(embeddings, mse_reduction=reduction, halve_variance=halve)
    assert terms["loss"].item() == pytest.approx(25 * s + 25 * v + c, abs=1e-10)
    assert [terms[name].item() for name in ("invariance", "variance", "covariance")] == pytest.approx([s, v, c])


def test_defaults_are_algorithm_1() -> None:
    settings = VICRegConfig()
    assert (settings.mse_reduction, settings.halve_variance) == ("mean", False)
    assert (settings.invariance, settings.variance, settings.covariance) == (25, 25, 1)


@pytest.mark.parametrize("weights", [{"invariance": 3.0}, {"variance": 2.0}, {"covariance": 0.5}])
def test_weights_weigh_their_terms(weights: dict[str, float], embeddings: dict[str, Tensor]) -> None:
    terms = {key: value.item() for key, value in objective(embeddings, **weights).items()}
    full = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0, **weights}
    assert terms["loss"] == pytest.approx(sum(weight * terms[name] for name, weight in full.items()), abs=1e-12)


def test_equal_views_with_the_identity_as_covariance_cost_nothing() -> None:
    z = torch.randn(40, 6, dtype=torch.float64)
    white = torch.linalg.qr(z - z.mean(0)).Q * 39**0.5
    terms = objective({"first": white, "second": white})
    assert terms["loss"].item() == pytest.approx(0, abs=1e-12)


def test_collapse_costs_the_whole_hinge() -> None:
    z = torch.full((B, D), 0.3, requires_grad=True)
    terms = objective({"first": z, "second": z})
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx(25 * 2 * (1 - 0.01), rel=1e-5)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_variance_and_covariance_are_of_each_view_alone(embeddings: dict[str, Tensor]) -> None:
    """No normalisation and no cross terms: images of one view may be permuted, but for the distance."""
    z1, z2 = embeddings["first"], embeddings["second"]
    permuted = {"first": z1, "second": z2.roll(1, 0)}
    one, other = objective(embeddings, invariance=0), objective(permuted, invariance=0)
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-12)
    assert objective(embeddings)["loss"].item() < objective(permuted)["loss"].item()
    scaled = {name: 3 * z for name, z in embeddings.items()}
    assert objective(scaled)["covariance"].item() == pytest.approx(81 * one["covariance"].item(), rel=1e-10)


def test_views_pass_apart_through_batch_norm() -> None:
    """Two forward passes: each view is normalised by its own statistics."""
    method = VICReg(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), 12, VICRegConfig(expander=(4,)))
    view = torch.randn(8, 3, 2, 2)
    batch = Batch(torch.arange(8), {"global": torch.stack([view, 5 + 9 * view])}, {})
    found = method.embed(batch)
    torch.testing.assert_close(found["first"], found["second"], rtol=1e-4, atol=1e-4)


def test_expander_is_the_paper_s() -> None:
    with torch.device("meta"):
        method = VICReg(nn.Identity(), 2048, VICRegConfig())
    assert [type(layer) for layer in method.expander] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear,
    ]  # fmt: skip
    linears = [layer for layer in method.expander if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(8192, 2048), (8192, 8192), (8192, 8192)]
    assert [layer.bias is None for layer in linears] == [False, False, True]


@pytest.mark.parametrize("wrong", [{"expander": []}, {"expander": [8, 0]}, {"covariance": -1}])
def test_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        VICRegConfig.model_validate(wrong)
