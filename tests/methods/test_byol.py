"""BYOL's objective, networks and moving target against its equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mvmr.methods.byol import BYOL, BYOLConfig
from mvmr.types import Batch, Step
from tiny import parts_and_data, tiny

SMALL = {"projector": [8, 6], "predictor_hidden": 7}
STEP = Step(3, 10, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def byol(**settings: Any) -> BYOL:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    return BYOL(encoder, 5, BYOLConfig.model_validate({**SMALL, **settings})).double()


def batch(*, seed: int = 1) -> Batch:
    return Batch(torch.arange(8), {"global": normal(2, 8, 3, 2, 2, seed=seed)})


def embeddings_of(q1: Tensor, q2: Tensor, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    return {"prediction1": q1, "prediction2": q2, "target1": z1, "target2": z2}


def loss_of(q1: Tensor, q2: Tensor, z1: Tensor, z2: Tensor) -> float:
    return byol().objective(embeddings_of(q1, q2, z1, z2), batch(), STEP)["loss"].item()


def moved(method: BYOL) -> BYOL:
    """The same method with other online weights, as after an optimiser's step."""
    with torch.no_grad():
        for k, parameter in enumerate(p for p in method.parameters() if p.requires_grad):
            parameter.add_(normal(*parameter.shape, seed=100 + k))
    return method


def test_the_loss_is_both_directions_of_equation_2() -> None:
    q1, q2, z1, z2 = (normal(9, 4, seed=seed) for seed in range(4))
    total = 0.0
    for i in range(9):
        for q, z in ((q1[i], z2[i]), (q2[i], z1[i])):  # each view's prediction against the other view's target
            lengths = math.sqrt(sum(float(v) ** 2 for v in q)) * math.sqrt(sum(float(v) ** 2 for v in z))
            total += (2 - 2 * sum(float(a) * float(b) for a, b in zip(q, z, strict=True)) / lengths) / 9
    assert loss_of(q1, q2, z1, z2) == pytest.approx(total, abs=1e-10)


def test_limits_of_the_loss() -> None:
    z1, z2 = normal(9, 2), normal(9, 2, seed=1)
    turned1, turned2 = (torch.stack([-z[:, 1], z[:, 0]], dim=1) for z in (z1, z2))
    assert loss_of(z2, z1, z1, z2) == pytest.approx(0, abs=1e-12)
    assert loss_of(turned2, turned1, z1, z2) == pytest.approx(4, abs=1e-12)
    assert loss_of(-z2, -z1, z1, z2) == pytest.approx(8, abs=1e-12)
    assert loss_of(5 * turned2, 0.1 * turned1, 3 * z1, z2) == pytest.approx(4, abs=1e-12)


def test_each_view_is_predicted_from_the_other() -> None:
    q1, q2, z1, z2 = (normal(9, 4, seed=seed) for seed in range(4))
    expected = loss_of(q1, q2, z1, z2)
    assert loss_of(q2, q1, z2, z1) == pytest.approx(expected, abs=1e-12), "the views' order does not matter"
    assert abs(loss_of(q1, q2, z2, z1) - expected) > 0.05, "but a view is not predicted from itself"


def test_the_target_gets_no_gradient() -> None:
    method = moved(byol())
    method.loss(batch(), STEP)["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target_"), name
    given = {name: normal(9, 4, seed=k).requires_grad_() for k, name in enumerate(embeddings_of(*[normal(1, 1)] * 4))}
    method.objective(given, batch(), STEP)["loss"].backward()
    assert {name for name, value in given.items() if value.grad is not None} == {"prediction1", "prediction2"}


def test_networks_are_the_papers() -> None:
    method = BYOL(nn.Identity(), 2048, BYOLConfig())
    for net, width in ((method.projector, 2048), (method.predictor, 256)):
        kinds = [type(layer) for layer in net]
        assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [tuple(net[k].weight.shape) for k in (0, 3)] == [(4096, width), (256, 4096)]
        assert net[0].bias is None
        assert net[3].bias is None
    assert method.exported() is method.encoder
    assert [layer.weight.shape for layer in (method.target_projector[0], method.target_projector[3])] == [
        (4096, 2048),
        (256, 4096),
    ]


def test_the_target_starts_equal_and_follows_both_networks() -> None:
    method = byol(momentum=0.8, final_momentum=0.8)
    for online, target in ((method.encoder, method.target_encoder), (method.projector, method.target_projector)):
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters(), strict=True))
    start = [p.detach().clone() for p in (*method.target_encoder.parameters(), *method.target_projector.parameters())]
    moved(method).after_step(STEP)
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    target = [*method.target_encoder.parameters(), *method.target_projector.parameters()]
    for before, now, goal in zip(start, target, online, strict=True):
        torch.testing.assert_close(now, 0.8 * before + 0.2 * goal, rtol=0, atol=1e-13)
        assert (now - before).abs().max() > 1e-3


def test_momentum_goes_from_its_base_to_one() -> None:
    method = byol(momentum=0.99)
    for k in range(101):
        expected = 1 - (1 - 0.99) * (math.cos(math.pi * k / 100) + 1) / 2
        assert method.momentum_at(Step(k, 101, 10)) == pytest.approx(expected, abs=1e-14)
    assert method.momentum_at(Step(0, 101, 10)) == 0.99
    assert method.momentum_at(Step(100, 101, 10)) == 1.0
    constant = byol(momentum=0.97, final_momentum=0.97)
    assert {round(constant.momentum_at(Step(k, 11, 5)), 12) for k in range(11)} == {0.97}


def test_the_last_step_leaves_the_target_where_it_is() -> None:
    method = moved(byol())
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.after_step(Step(9, 10, 5))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_views_pass_apart_through_batch_norm_and_the_target_has_its_own() -> None:
    method = byol().train()
    views = batch().views["global"]
    plain = method.embed(Batch(torch.arange(8), {"global": views}))
    scaled = method.embed(Batch(torch.arange(8), {"global": torch.stack([views[0], 5 + 9 * views[1]])}))
    for name, value in plain.items():  # a change of one view's scale is normalised away, and not seen by the other
        torch.testing.assert_close(value, scaled[name], rtol=1e-3, atol=1e-4)
    norms = method.encoder[2], method.target_encoder[2]
    assert all(norm.num_batches_tracked.item() == 4 for norm in norms)
    moved(method).embed(batch())
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)


def test_logged_terms_tell_a_collapse() -> None:
    method = byol()
    point = normal(1, 4).expand(9, -1)
    collapsed = method.objective(embeddings_of(point, point, point, point), batch(), STEP)
    assert collapsed["loss"].item() == pytest.approx(0, abs=1e-12)
    assert collapsed["z_std"].item() == pytest.approx(0, abs=1e-12)
    assert collapsed["cosine/views"].item() == pytest.approx(1, abs=1e-12)
    q = [normal(512, 4, seed=seed) for seed in range(4)]
    healthy = method.objective(embeddings_of(*q), batch(), STEP)
    assert healthy["z_std"].item() == pytest.approx(0.5, abs=0.01)
    assert healthy["cosine/views"].item() == pytest.approx(0, abs=0.1)


def test_a_step_of_training_moves_the_target_by_the_schedule() -> None:
    run = tiny("byol")
    parts, data = parts_and_data(run)
    method = parts.method
    assert isinstance(method, BYOL)
    optimizer = torch.optim.SGD(method.parameter_groups()[0]["params"], lr=0.1)
    start = [p.detach().clone() for p in method.target_projector.parameters()]
    method.loss(parts.maker(next(iter(data.loader()))), Step(0, 12, 6))["loss"].backward()
    optimizer.step()
    method.after_step(Step(0, 12, 6))  # tau is its base there, 0.9
    for before, now, goal in zip(
        start, method.target_projector.parameters(), method.projector.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * goal, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(start, method.target_projector.parameters(), strict=True))


@pytest.mark.parametrize(
    "wrong", [{"projector": []}, {"projector": [8, 0]}, {"momentum": 1.1}, {"predictor_hidden": 0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        BYOLConfig.model_validate(wrong)
