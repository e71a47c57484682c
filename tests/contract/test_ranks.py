"""The same gradient on 1, 2 and 4 devices, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mvmr.methods import METHODS
from mvmr.ops.layers import synchronise_batch_norm
from mvmr.types import Step
from ranks import run_on_ranks
from tiny import in_float64, parts_and_data, tiny


def gradients(rank: int, name: str, world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients (averaged over ranks, as DDP does) and buffers after one step's forward and backward."""
    run = tiny(name)
    parts, data = parts_and_data(run)
    maker = in_float64(parts.maker)
    method = parts.method.double().train()
    if world_size > 1:
        method = synchronise_batch_norm(method)
    loaded = next(iter(data.loader(rank, world_size)))
    assert len(loaded.index) == run.data.batch_size // world_size
    method.loss(maker(loaded), Step(0, 10, 5))["loss"].backward()
    found = {}
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None
        if world_size > 1:
            torch.distributed.all_reduce(parameter.grad)
        found[key] = parameter.grad / world_size
    return found, {key: value.clone() for key, value in method.named_buffers()}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_gradient_on_ranks_is_that_of_one_process(name: str, world_size: int) -> None:
    whole, whole_buffers = gradients(0, name, 1)
    for found, buffers in run_on_ranks(gradients, world_size, name, world_size):
        assert found.keys() == whole.keys()
        for key, gradient in whole.items():
            scale = gradient.abs().max().clamp(min=1e-12)
            assert (found[key] - gradient).abs().max() <= 1e-9 * max(1.0, scale.item()), key
            assert (found[key] - gradient).abs().max() <= 1e-7 * scale, f"{key}: relative"
        for key, value in whole_buffers.items():
            torch.testing.assert_close(buffers[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_training_on_two_processes_follows_one(name: str, tmp_path: Path) -> None:
    """The command itself, with Lightning's DDP: same folder, same losses to rounding, one writer."""
    run = tiny(name, schedule__epochs=1, online__every_epochs=1, online__images=32)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run.resolved()))
    losses = {}
    for devices in (1, 2):
        out = tmp_path / f"on-{devices}"
        command = [sys.executable, "-m", "mvmr", "train", str(recipe), f"engine.devices={devices}", "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[devices] = [line["train/loss"] for line in lines if "train/loss" in line]
        assert (out / "encoder.safetensors").exists()
        assert sum("rankme" in line for line in lines) == 1, "one rank measures"
    assert len(losses[1]) == 6
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
