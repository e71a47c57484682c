"""A run that breaks off while its images are being labelled goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvmr.engine.passes import DataPass
from mvmr.engine.train import train
from tiny import tiny


class PowerCutError(Exception):
    """What ends the run."""


def passes_broken_off(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """From now on the pass of that number ends after its first images; the list counts passes."""
    whole, passes = DataPass.__call__, [0]

    def broken(self: DataPass, fn: Any, /) -> Any:
        passes[0] += 1

        def once(images: torch.Tensor) -> torch.Tensor:
            fn(images)
            raise PowerCutError

        return whole(self, once if passes[0] == number else fn)

    monkeypatch.setattr(DataPass, "__call__", broken)
    return passes


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("label_mode", ["eval", "train"])
def test_broken_off_during_a_label_step(
    number: int, label_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {
        "name": "self_label", "heads": 2, "clusters": 6, "strength": 5.0, "labellings": 5, "label_mode": label_mode,
    }  # fmt: skip
    run = tiny("self_label", method=method, engine__checkpoint_every_steps=1)
    train(run, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        passes = passes_broken_off(patch, number)
        with pytest.raises(PowerCutError):
            train(run, tmp_path / "cut", quiet=True)
        assert passes == [number]
        assert not (tmp_path / "cut/encoder.safetensors").exists()
    train(run, tmp_path / "cut", resume=True, quiet=True)
    expected, found = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "cut"))
    for key, value in expected.items():
        assert value.equal(found[key]), key
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    labels = [state["state_dict"]["method.labels"] for state in states]
    assert labels[0].equal(labels[1])
