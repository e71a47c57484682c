"""Methods that label the data set: a run that stops between two labellings, or during one, ends as if it had not, and
two devices label as one does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mvmr.config import Run
from mvmr.engine.module import Adapter
from mvmr.engine.train import train
from mvmr.methods import METHODS, Method
from mvmr.ops.batch_norm import synchronise_batch_norm
from mvmr.types import Step
from ranks import run_on_ranks
from tiny import Relabelling, in_float64, parts_and_data, tiny

RELABELLING = sorted(name for name, method in METHODS.items() if method.before_step is not Method.before_step)


class Stopped(Exception):
    """What a run dies of here; a signal's part is played by the tests of resuming."""


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def losses_of(out: Path) -> list[float]:
    lines = [yaml.safe_load(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def check_same(resumed: Path, whole: Path) -> None:
    expected, found = weights_of(whole), weights_of(resumed)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert losses_of(resumed) == losses_of(whole)


@pytest.mark.parametrize("name", RELABELLING)
def test_stopped_between_two_labellings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(name, schedule__epochs=3, engine__checkpoint_every_steps=2)
    train(run, tmp_path / "whole", quiet=True)
    step = Adapter.training_step

    def stop(self: Adapter, *arguments: Any) -> Any:
        if self.global_step == 9:
            raise Stopped
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Adapter, "training_step", stop)
        assert dies(run, tmp_path / "stopped")
    train(run, tmp_path / "stopped", resume=True, quiet=True)
    check_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("name", RELABELLING)
def test_stopped_during_a_labelling(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies in the middle of `before_step`, where labels are brought together and some may have been stored."""
    run, module = tiny(name, schedule__epochs=3), sys.modules[METHODS[name].__module__]
    together, calls = module.of_all_ranks, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == fatal:
            raise Stopped
        return together(*arguments)

    monkeypatch.setattr(module, "of_all_ranks", counted)
    fatal = 0
    train(run, tmp_path / "whole", quiet=True)
    if len(calls) < 2:
        pytest.skip(f"{name} labels the data once")
    fatal = len(calls) // 2 + 1  # in the second half of the run, and of a labelling of two parts
    calls.clear()
    assert dies(run, tmp_path / "stopped")
    fatal = 0
    train(run, tmp_path / "stopped", resume=True, quiet=True)
    check_same(tmp_path / "stopped", tmp_path / "whole")


def dies(run: Run, out: Path) -> bool:
    """Whether a run was stopped."""
    try:
        train(run, out, quiet=True)
    except Stopped:
        return True
    return False


def labelled(rank: int, name: str, world_size: int) -> dict[str, torch.Tensor]:
    """Integer buffers after every labelling of the first two epochs, with a few steps between them."""
    run = tiny(name)
    parts, data = parts_and_data(run)
    method, maker = parts.method.double().train(), in_float64(parts.maker)
    if world_size > 1:
        method = synchronise_batch_norm(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    relabel = Relabelling(run, parts, optimizer, rank=rank, world_size=world_size)
    step = Step(0, 12, 6)
    found: dict[str, torch.Tensor] = {}
    data.weights = lambda: relabel(step)
    loader = data.loader(rank, world_size)
    for _ in range(2):  # epochs
        for loaded in loader:
            relabel(step)
            torch.manual_seed(step.step)
            optimizer.zero_grad()
            method.loss(maker(loaded), step)["loss"].backward()
            for parameter in method.parameters():
                if world_size > 1 and parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= world_size
            optimizer.step()
            method.after_step(step)
            for key, value in method.named_buffers():
                if not value.is_floating_point() and "num_batches" not in key:
                    found[f"{key} at {step.step}"] = value.clone()
            step = Step(step.step + 1, 12, 6)
    return found


@pytest.mark.parametrize("name", RELABELLING)
def test_two_ranks_have_the_labels_of_one(name: str) -> None:
    whole = labelled(0, name, 1)
    assert whole
    for found in run_on_ranks(labelled, 2, name, 2):
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(found[key], value), key
