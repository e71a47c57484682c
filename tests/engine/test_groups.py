"""What the engine does by groups and by tensors: decay and rates that follow a curve or stay, clipping, LARS's cap."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import nn

from mvmr.engine.optim import LARS, OptimizerConfig, build_optimizer
from mvmr.engine.train import assemble
from mvmr.errors import UserError
from mvmr.methods import MVMR
from tiny import parts_and_data, tiny


class Groups(Callback):
    """Notes every group's rate and decay at each optimiser step."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups])


def fitted(tmp_path: Path, **changes: Any) -> tuple[Groups, Any]:
    run = tiny(**changes)
    parts, _ = parts_and_data(run)
    trainer, adapter, data = assemble(run, parts, tmp_path, quiet=True)
    groups = Groups()
    trainer.callbacks.append(groups)
    trainer.fit(adapter, datamodule=data)
    return groups, adapter


def test_weight_decay_follows_a_half_cosine(tmp_path: Path) -> None:
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.04, "final_weight_decay": 0.4}
    groups, adapter = fitted(tmp_path, optimizer=optimizer)
    assert adapter.total_steps == 12
    expected = [0.4 - 0.36 * (1 + math.cos(math.pi * step / 11)) / 2 for step in range(12)]
    seen = [step[0]["weight_decay"] for step in groups.seen]
    assert seen == pytest.approx(expected, rel=1e-12)
    assert all(step[1]["weight_decay"] == 0.0 for step in groups.seen), "biases and norms stay out of it"


def test_a_groups_own_decay_is_not_scheduled() -> None:
    own = {"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.3}
    optimizer = build_optimizer([own, {"params": [nn.Parameter(torch.ones(2, 2))]}], OptimizerConfig(), 0.1)
    assert [(group["weight_decay"], group["run_decay"]) for group in optimizer.param_groups] == [
        (0.3, False),
        (1e-6, True),
    ]


def test_a_group_may_keep_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def groups_of(self: MVMR) -> list[dict]:
        return [{"params": self.encoder.parameters()}, {"params": self.projector.parameters(), "constant_lr": True}]

    monkeypatch.setattr(MVMR, "parameter_groups", groups_of)
    groups, adapter = fitted(tmp_path)
    rates = [[group["lr"] for group in step] for step in groups.seen]
    constant = [bool(group.get("constant_lr")) for group in adapter.optimizers().param_groups]
    assert constant == [False, False, True, True]
    for step in rates:
        assert step[2:] == [1e-3, 1e-3]
    assert rates[0][0] == pytest.approx(1e-5)
    assert len({step[0] for step in rates}) > 8


def test_a_rate_that_falls_in_steps(tmp_path: Path) -> None:
    schedule = {"epochs": 2, "warmup_epochs": 0, "shape": "steps", "drops": [1, 1.5], "drop_factor": 0.5}
    groups, _ = fitted(tmp_path, schedule=schedule)
    assert [step[0]["lr"] for step in groups.seen] == pytest.approx([1e-3] * 6 + [5e-4] * 3 + [2.5e-4] * 3, rel=1e-12)
    with pytest.raises(UserError, match=r"schedule: drops are given, but shape is cosine.*schedule\.shape=steps"):
        tiny(schedule={"epochs": 2, "drops": [1]})


@pytest.mark.parametrize("each", [False, True])
def test_clipping_all_together_or_each_by_itself(each: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[float], list[float]]] = []

    class Watch(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # the closure makes the gradients and clips them
            result = super().step(closure)
            after = [p.grad.norm().item() for g in self.param_groups for p in g["params"] if p.grad is not None]
            seen.append((before[-1], after))
            return result

    before: list[list[float]] = []
    whole = MVMR.after_backward

    def note(self: MVMR, step: Any) -> None:
        before.append([p.grad.norm().item() for p in self.parameters() if p.grad is not None])
        whole(self, step)

    monkeypatch.setattr(MVMR, "after_backward", note)
    monkeypatch.setattr("mvmr.engine.optim.SGD", Watch)
    limit = 0.05
    fitted(
        tmp_path, optimizer={"name": "sgd", "lr": 1e-3, "decay_biases_and_norms": True},
        engine__clip_norm=limit, engine__clip_each=each, schedule__epochs=1,
    )  # fmt: skip
    assert len(seen) == 6
    for raw, clipped in seen:
        if each:
            expected = [norm * min(1.0, limit / (norm + 1e-6)) for norm in raw]
        else:
            total = math.sqrt(sum(norm**2 for norm in raw))
            expected = [norm * min(1.0, limit / (total + 1e-6)) for norm in raw]
        assert clipped == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert max(max(raw) for raw, _ in seen) > limit, "something was clipped"


@pytest.mark.parametrize(("coefficient", "expected"), [(0.001, 0.001), (0.02, 0.02), (10.0, 0.5)])
def test_a_clipped_lars_never_exceeds_its_rate(coefficient: float, expected: float) -> None:
    """||p|| = ||d|| = 4, so the adapted rate is min(coefficient, lr), where without the cap it is coefficient x lr."""
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    parameter.grad = torch.ones(4, 4, dtype=torch.float64)
    LARS([parameter], 0.5, momentum=0.0, trust_coefficient=coefficient, clip=True).step()
    assert (1 - parameter[0, 0]).item() == pytest.approx(expected, rel=1e-5)


def test_a_clipped_lars_at_rate_zero_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    LARS([parameter], 0.0, clip=True).step()
    assert torch.equal(parameter, torch.ones(2, 2))
