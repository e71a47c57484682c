"""Barlow Twins' objective against Eq. 1 and 2 written as loops, its settings, its layers and its rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mvmr.config import load
from mvmr.engine.optim import build_optimizer
from mvmr.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from mvmr.types import Batch, Step

B, D = 7, 5
STEP = Step(0, 1, 1)
BATCH = Batch(torch.arange(B), {}, {})


def column(z: Tensor, i: int) -> list[float]:
    """Column i, centred and divided by its biased deviation."""
    values = [float(value) for value in z[:, i]]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
    return [(value - mean) / deviation for value in values]


def correlations(z1: Tensor, z2: Tensor) -> list[list[float]]:
    """Eq. 2."""
    first, second = ([column(z, i) for i in range(z.shape[1])] for z in (z1, z2))
    return [[sum(a * b for a, b in zip(x, y, strict=True)) / len(z1) for y in second] for x in first]


@pytest.fixture
def embeddings() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return {"first": first, "second": first + 0.5 * torch.randn(B, D, generator=generator, dtype=torch.float64)}


def objective(embeddings: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    method = BarlowTwins(nn.Identity(), D, BarlowTwinsConfig.model_validate({"projector": [4], **settings}))
    return method.objective(embeddings, BATCH, STEP)


def test_loss_is_equation_1(embeddings: dict[str, Tensor]) -> None:
    c = correlations(embeddings["first"], embeddings["second"])
    invariance = sum((1 - c[i][i]) ** 2 for i in range(D))
    redundancy = sum(c[i][j] ** 2 for i in range(D) for j in range(D) if i != j)
    terms = objective(embeddings)
    assert terms["loss"].item() == pytest.approx(invariance + 0.0051 * redundancy, abs=1e-12)
    assert terms["invariance"].item() == pytest.approx(invariance, abs=1e-12)
    assert terms["redundancy"].item() == pytest.approx(redundancy, abs=1e-12)
    assert terms["correlation/views"].item() == pytest.approx(sum(c[i][i] for i in range(D)) / D, abs=1e-12)
    mean_square = redundancy / (D * (D - 1))
    assert terms["correlation/dimensions"].item() == pytest.approx(math.sqrt(mean_square), abs=1e-12)


def test_settings_weigh_the_terms(embeddings: dict[str, Tensor]) -> None:
    terms = {key: value.item() for key, value in objective(embeddings, redundancy=2.0, scale=0.1).items()}
    assert terms["loss"] == pytest.approx(0.1 * (terms["invariance"] + 2 * terms["redundancy"]), abs=1e-12)
    assert objective(embeddings, epsilon=1.0)["correlation/views"].item() < terms["correlation/views"]


def test_one_dimension_and_collapsed_embeddings_are_finite() -> None:
    z = torch.full((B, 1), 0.3, requires_grad=True)
    terms = objective({"first": z, "second": z})
    terms["loss"].backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms["loss"].item() == pytest.approx(1, abs=1e-6)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_gradient_reaches_both_views(embeddings: dict[str, Tensor]) -> None:
    inputs = {name: z.clone().requires_grad_() for name, z in embeddings.items()}
    objective(inputs)["loss"].backward()
    for z in inputs.values():
        assert z.grad is not None
        assert z.grad.abs().min() > 0


def test_views_pass_apart_through_batch_norm() -> None:
    """Two forward passes: each view is normalised by its own statistics."""
    method = BarlowTwins(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), 12, BarlowTwinsConfig(projector=(4,)))
    view = torch.randn(8, 3, 2, 2)
    batch = Batch(torch.arange(8), {"global": torch.stack([view, 5 + 9 * view])}, {})
    found = method.embed(batch)
    torch.testing.assert_close(found["first"], found["second"], rtol=1e-4, atol=1e-4)


def test_projector_is_the_paper_s() -> None:
    with torch.device("meta"):
        method = BarlowTwins(nn.Identity(), 2048, BarlowTwinsConfig())
    assert [type(layer) for layer in method.projector] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear,
    ]  # fmt: skip
    linears = [layer for layer in method.projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(8192, 2048), (8192, 8192), (8192, 8192)]
    assert all(layer.bias is None for layer in linears)


def test_biases_and_norms_have_a_rate_of_their_own() -> None:
    """Section 2.2 at a batch of 2048: 0.2 x 8 for weights, 0.0048 x 8 / 32 and no decay for biases and norms."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6))
    encoder[0].weight.requires_grad_(False)
    run = load("barlow_twins_imagenet", ["method.projector=[8, 8]"])
    method = BarlowTwins(encoder, 6, run.method)
    assert run.data.batch_size == 2048
    optimizer = build_optimizer(method.parameter_groups(), run.optimizer, run.peak_lr)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    trained = {key: rates[id(p)] for key, p in method.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) == 9
    for key, (rate, decay) in trained.items():
        matrix = key in ("encoder.3.weight", "projector.0.weight", "projector.3.weight")
        assert rate == pytest.approx(1.6 if matrix else 0.0012), key
        assert decay == (1.5e-6 if matrix else 0.0), key


@pytest.mark.parametrize("wrong", [{"projector": []}, {"projector": [8, 0]}, {"epsilon": 0}, {"scale": 0}])
def test_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        BarlowTwinsConfig.model_validate(wrong)
