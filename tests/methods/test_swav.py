"""SwAV's networks, queue, frozen prototypes and objective; what codes and losses compute is in tests/ops and losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvmr.methods.swav import SwAV, SwAVConfig
from mvmr.ops.sinkhorn import sinkhorn
from mvmr.types import Batch, Step
from pool import Pool

SMALL: dict[str, Any] = {"hidden": 12, "dim": 6, "prototypes": 9, "queue": 0}
B = 4


def method(**settings: Any) -> SwAV:
    torch.manual_seed(0)
    return SwAV(Pool(), 5, SwAVConfig.model_validate({**SMALL, **settings})).double().train()


def batch(*, small: int = 3, side: int = 4, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {"global": torch.randn(2, B, 3, 8, 8, generator=generator, dtype=torch.float64)}
    if small:
        views["local"] = torch.randn(small, B, 3, side, side, generator=generator, dtype=torch.float64)
    return Batch(torch.arange(B), views)


def step(at: int = 0) -> Step:
    return Step(at, 20, 5)


def embedded(swav: SwAV, given: Batch) -> Tensor:
    """z of every view, the head's batch norm over all of them: [V, B, E]."""
    views = [*given.views["global"], *given.views.get("local", ())]
    features = torch.cat([swav.encoder(view) for view in views])
    return normalize(swav.projector(features), dim=1).unflatten(0, (-1, B))


@pytest.mark.parametrize("small", [0, 3])
def test_objective_is_the_papers(small: int) -> None:
    swav, given = method(), batch(small=small)
    terms = swav.loss(given, step())
    z, c = embedded(swav, given), swav.prototypes.weight
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        q = sinkhorn(z[i] @ c.T, epsilon=0.05)
        for v in range(2 + small):
            if v != i:
                log_p = torch.log_softmax(z[v] @ c.T / 0.1, dim=1)
                total = total - (q * log_p).sum(1).mean()
    assert terms["loss"].item() == pytest.approx(total.item() / (2 * (1 + small)), rel=1e-10)
    assert 0 <= terms["agreement"] <= 1
    assert terms["entropy/code"] <= math.log(9)
    assert terms["entropy/mean"] <= math.log(9)
    assert 0 < terms["z_std"] <= 6**-0.5


def test_gradient_reaches_prototypes_through_the_predictions_alone() -> None:
    swav, given = method(), batch()
    swav.loss(given, step())["loss"].backward()
    z, c = embedded(swav, given).detach(), swav.prototypes.weight.detach()
    expected = torch.zeros_like(c)
    for i in range(2):
        q = sinkhorn(z[i] @ c.T, epsilon=0.05)
        for v in range(5):
            if v != i:
                expected += (torch.softmax(z[v] @ c.T / 0.1, 1) - q).T @ z[v] / 0.1 / B / 8
    torch.testing.assert_close(swav.prototypes.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_one_pass_a_size_and_the_head_once() -> None:
    swav = method()
    norm: Any = swav.projector[1]
    assert swav.embed(batch())["z"].shape == (B, 5, 6)
    assert swav.encoder.given == [(2 * B, 3, 8, 8), (3 * B, 3, 4, 4)]
    assert norm.num_batches_tracked == 1
    swav.encoder.given.clear()
    swav.embed(batch(side=8))
    assert swav.encoder.given == [(5 * B, 3, 8, 8)]
    assert swav.exported() is swav.encoder


def test_head_is_the_papers() -> None:
    swav = SwAV(Pool(), 5, SwAVConfig())
    assert [type(layer) for layer in swav.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert swav.projector[0].weight.shape == (2048, 5)
    assert swav.projector[3].weight.shape == (128, 2048)
    assert all(layer.bias is not None for layer in (swav.projector[0], swav.projector[3]))
    assert swav.prototypes.weight.shape == (3000, 128)
    assert swav.codes.queue.keys.shape == (3840, 2 * 128)


def trained(swav: SwAV, given: Batch, at: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    optimizer.zero_grad()
    terms = swav.loss(given, step(at))
    terms["loss"].backward()
    swav.after_backward(step(at))
    optimizer.step()
    swav.after_step(step(at))
    return terms


def test_prototypes_are_frozen_in_the_first_epoch_and_unit_after_every_step() -> None:
    swav, given = method(freeze_prototypes_epochs=1), batch()
    optimizer = torch.optim.SGD(swav.parameters(), 0.1, 0.9, weight_decay=0.1)
    for at in range(7):
        before = swav.prototypes.weight.detach().clone()
        trained(swav, given, at, optimizer)
        moved = (swav.prototypes.weight - before).abs().max()
        assert (moved < 1e-6) == (at < 5), at  # five steps an epoch; rounding of the norm is all that moves them
        torch.testing.assert_close(swav.prototypes.weight.norm(dim=1), torch.ones(9, dtype=torch.float64))


def test_queue_fills_from_its_epoch_on_and_then_takes_part() -> None:
    swav = method(queue=6, queue_epoch=1, freeze_prototypes_epochs=0)
    optimizer = torch.optim.SGD(swav.parameters(), 0.0)
    seen: list[Tensor] = []
    for at in range(9):
        given = batch(seed=at)
        queue = swav.codes.queue.keys.clone()
        terms = swav.loss(given, step(at))
        assert torch.equal(swav.codes.queue.keys, queue)  # changes after the step alone
        swav._pending.clear()
        z = embedded(swav, given).transpose(0, 1).detach()  # [B, V, E]
        past = torch.cat(seen)[-6:] if len(seen) * B >= 6 else None
        costs = []
        for i in range(2):
            rows = z[:, i] if past is None else torch.cat([past[:, i], z[:, i]])
            q = sinkhorn(rows @ swav.prototypes.weight.T, epsilon=0.05)[-B:]
            costs += [-(q * torch.log_softmax(z[:, v] @ swav.prototypes.weight.T / 0.1, 1)).sum(1).mean()
                      for v in range(5) if v != i]  # fmt: skip
        assert terms["loss"].item() == pytest.approx(torch.stack(costs).mean().item(), rel=1e-9), at
        trained(swav, given, at, optimizer)
        if at >= 5:
            seen.append(z[:, :2])
        assert bool(swav.codes.queue.keys.any()) == (at >= 5)
    assert swav._pending == []


def test_accumulated_batches_all_enter_the_queue() -> None:
    swav = method(queue=8, queue_epoch=0)
    for seed in (1, 2):
        swav.loss(batch(seed=seed), step())
    assert not swav.codes.queue.keys.any()
    swav.after_step(step())
    assert swav.codes.queue.keys.abs().sum(1).gt(0).all()
    assert int(swav.codes.queue.pointer) == 0


def test_a_network_that_says_one_thing_is_at_the_logarithm_of_k() -> None:
    """The collapse that the authors describe: one embedding, uniform codes, loss ln K."""
    swav, given = method(), batch()
    with torch.no_grad():
        swav.projector[3].weight.zero_()
    terms = swav.loss(given, step())
    q = swav.codes(torch.zeros(B, 2, 6, dtype=torch.float64), swav.prototypes)
    torch.testing.assert_close(q, torch.full_like(q, 1 / 9))
    assert terms["z_std"] < 1e-9
    assert terms["entropy/code"].item() == pytest.approx(math.log(9))
    assert terms["loss"] >= math.log(9) - 1e-9


def test_settings_out_of_range_are_refused() -> None:
    wrong: dict[str, Any]
    for wrong in ({"epsilon": 0.0}, {"prototypes": 1}, {"queue": -1}, {"temperature": 0}, {"sinkhorn_iterations": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            SwAVConfig.model_validate(wrong)
    SwAVConfig().check_views({"global": 2})
    with pytest.raises(ValueError, match="2 views of the stream `global`"):
        SwAVConfig().check_views({"global": 1, "local": 6})
    assert SwAVConfig().remarks({"global": 2, "local": 6}, []) == []
