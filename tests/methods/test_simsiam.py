"""SimSiam's objective, networks and groups against its equations; what the stop-gradient changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mvmr.engine.optim import OptimizerConfig, build_optimizer
from mvmr.engine.train import assemble
from mvmr.methods.simsiam import SimSiam, SimSiamConfig
from mvmr.types import Batch, Step
from tiny import METHODS, parts_and_data, tiny

SMALL = {"projector": [8, 6], "predictor_hidden": 3}
STEP = Step(3, 10, 5)
NAMES = ("prediction1", "prediction2", "projection1", "projection2")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simsiam(**settings: Any) -> SimSiam:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    return SimSiam(encoder, 5, SimSiamConfig.model_validate({**SMALL, **settings})).double()


def batch() -> Batch:
    return Batch(torch.arange(8), {"global": normal(2, 8, 3, 2, 2, seed=1)})


def terms_of(*embeddings: Tensor) -> dict[str, float]:
    """The terms for predictions of both views, then projections of both."""
    terms = simsiam().objective(dict(zip(NAMES, embeddings, strict=True)), batch(), STEP)
    return {name: value.item() for name, value in terms.items()}


def test_the_loss_is_equation_4() -> None:
    p1, p2, z1, z2 = (normal(9, 4, seed=seed) for seed in range(4))
    total = 0.0
    for i in range(9):
        for p, z in ((p1[i], z2[i]), (p2[i], z1[i])):
            lengths = math.sqrt(sum(float(v) ** 2 for v in p)) * math.sqrt(sum(float(v) ** 2 for v in z))
            total -= sum(float(a) * float(b) for a, b in zip(p, z, strict=True)) / lengths / 9 / 2
    assert terms_of(p1, p2, z1, z2)["loss"] == pytest.approx(total, abs=1e-10)


def test_the_loss_is_between_minus_one_and_one() -> None:
    z1, z2 = normal(9, 4), normal(9, 4, seed=1)
    assert terms_of(3 * z2, z1, z1, z2)["loss"] == pytest.approx(-1, abs=1e-12)
    assert terms_of(-z2, -0.5 * z1, z1, z2)["loss"] == pytest.approx(1, abs=1e-12)
    for seed in range(20):
        assert -1 < terms_of(*(normal(3, 2, seed=4 * seed + k) for k in range(4)))["loss"] < 1


def test_the_gradient_stops_at_the_projections() -> None:
    given = {name: normal(9, 4, seed=k).requires_grad_() for k, name in enumerate(NAMES)}
    simsiam().objective(given, batch(), STEP)["loss"].backward()
    assert {name for name, value in given.items() if value.grad is not None} == {"prediction1", "prediction2"}


def gradients(method: SimSiam, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(method.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True), strict=True))


def test_without_the_stop_gradient_the_gradients_differ() -> None:
    """Eq. 2 in place of Eq. 4: the predictor learns the same, the encoder and the projector do not."""
    method = simsiam()
    embeddings = method.embed(batch())
    p1, p2, z1, z2 = (embeddings[name] for name in NAMES)
    stopped = method.objective(embeddings, batch(), STEP)["loss"]
    flowing = -(cosine_similarity(p1, z2) + cosine_similarity(p2, z1)).mean() / 2
    assert stopped.item() == pytest.approx(flowing.item(), abs=1e-12)
    ours, others = gradients(method, stopped), gradients(method, flowing)
    assert len(ours) == len(list(method.parameters()))
    for name, gradient in ours.items():
        error = (gradient - others[name]).abs().max().item()
        if name.startswith("predictor."):
            assert error < 1e-12, name
        elif gradient.norm() > 1e-9:  # a bias before batch norm has none
            assert error > 1e-3 * gradient.abs().max().item(), name


def test_without_a_predictor_the_stop_gradient_only_halves_the_gradient() -> None:
    """Section 4.2: the direction is that of Eq. 2, which collapses; the predictor is what makes Eq. 4 differ."""
    z = normal(2, 6, 3).requires_grad_()
    loss = -(cosine_similarity(z[0], z[1]) + cosine_similarity(z[1], z[0])).mean() / 2
    (flowing,) = torch.autograd.grad(loss, z)
    stopped = simsiam().objective(dict(zip(NAMES, (z[0], z[1], z[0], z[1]), strict=True)), batch(), STEP)["loss"]
    (stopped_gradient,) = torch.autograd.grad(stopped, z)
    torch.testing.assert_close(flowing, 2 * stopped_gradient, rtol=1e-10, atol=1e-14)


def test_networks_are_the_papers() -> None:
    method = SimSiam(nn.Identity(), 1024, SimSiamConfig())
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in method.projector] == [*block, *block, nn.Linear, nn.BatchNorm1d]
    linears = [layer for layer in method.projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(2048, 1024), (2048, 2048), (2048, 2048)]
    assert all(layer.bias is None for layer in linears)
    assert [m.affine for m in method.projector if isinstance(m, nn.BatchNorm1d)] == [True, True, False]
    assert [type(layer) for layer in method.predictor] == [*block, nn.Linear]
    assert [tuple(method.predictor[k].weight.shape) for k in (0, 3)] == [(512, 2048), (2048, 512)]
    assert method.predictor[0].bias is None
    assert method.predictor[3].bias is not None
    assert method.exported() is method.encoder
    two = SimSiam(nn.Identity(), 512, SimSiamConfig(projector=(2048, 2048)))
    assert sum(isinstance(layer, nn.Linear) for layer in two.projector) == 2


def test_views_pass_apart_through_batch_norm() -> None:
    method = simsiam().train()
    views = batch().views["global"]
    plain = method.embed(Batch(torch.arange(8), {"global": views}))
    scaled = method.embed(Batch(torch.arange(8), {"global": torch.stack([views[0], 5 + 9 * views[1]])}))
    for name, value in plain.items():
        torch.testing.assert_close(value, scaled[name], rtol=1e-3, atol=1e-4)


def test_logged_terms_tell_a_collapse() -> None:
    """Section 4.1: without a stop-gradient the loss is -1 and the deviation 0; healthy, it is near 1/sqrt(d)."""
    point = normal(1, 16).expand(512, -1)
    collapsed = terms_of(point, point, point, point)
    assert collapsed["loss"] == pytest.approx(-1, abs=1e-12)
    assert collapsed["z_std"] == pytest.approx(0, abs=1e-12)
    assert collapsed["cosine/views"] == pytest.approx(1, abs=1e-12)
    z = normal(512, 16)
    healthy = terms_of(z, z, z, z)
    assert healthy["loss"] == pytest.approx(-1, abs=1e-12), "the loss alone does not tell the two apart"
    assert healthy["z_std"] == pytest.approx(1 / 4, rel=0.02)


@pytest.mark.parametrize("constant", [True, False])
def test_the_predictors_rate_may_stay_at_its_peak(constant: bool, tmp_path: Path) -> None:
    class Rates(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})

    seen: list[dict[int, float]] = []
    settings = {**METHODS["simsiam"]["method"], "constant_predictor_lr": constant}
    run = tiny("simsiam", method=settings, schedule={"epochs": 1, "warmup_epochs": 0, "final": 0.0})
    parts, _ = parts_and_data(run)
    trainer, adapter, data = assemble(run, parts, tmp_path, quiet=True)
    trainer.callbacks.append(Rates())
    trainer.fit(adapter, datamodule=data)
    method = parts.method
    assert isinstance(method, SimSiam)
    assert set(seen[0]) == {id(p) for p in method.parameters()}, "every parameter is trained once"
    curve = [0.5e-3 * (1 + math.cos(math.pi * step / 5)) for step in range(6)]
    for step, rates in enumerate(seen):
        for module in (method.encoder, method.projector, method.predictor):
            expected = 1e-3 if constant and module is method.predictor else curve[step]
            assert all(rates[id(p)] == pytest.approx(expected, abs=1e-12) for p in module.parameters())
    assert len(seen) == 6


def test_weight_decay_is_on_every_parameter_where_asked() -> None:
    config = OptimizerConfig(name="sgd", weight_decay=1e-4, decay_biases_and_norms=True)
    groups = build_optimizer(simsiam().parameter_groups(), config, 0.1).param_groups
    assert {group["weight_decay"] for group in groups} == {1e-4}
    assert [group["constant_lr"] for group in groups if "constant_lr" in group] == [True]
