"""The same gradient on 1, 2 and 4 devices, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import same_losses, trained_on
from mvmr.methods import METHODS
from mvmr.ops.layers import synchronise_batch_norm
from mvmr.types import Step
from ranks import averaged_gradients, run_on_ranks
from tiny import in_float64, parts_and_data, tiny


def gradients(rank: int, name: str, world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients (averaged over ranks, as DDP does) and buffers after one step but for the optimiser's part."""
    run = tiny(name)
    parts, data = parts_and_data(run)
    maker = in_float64(parts.maker)
    method = parts.method.double().train()
    if world_size > 1:
        method = synchronise_batch_norm(method)
    loaded = next(iter(data.loader(rank, world_size)))
    assert len(loaded.index) == run.data.batch_size // world_size
    step = Step(0, 10, 5)
    torch.manual_seed(rank)  # a method that draws must not need equal numbers on all ranks
    method.loss(maker(loaded), step)["loss"].backward()
    found = averaged_gradients(method, world_size)
    method.after_backward(step)
    method.after_step(step)
    return found, {key: value.clone() for key, value in method.named_buffers()}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_gradient_on_ranks_is_that_of_one_process(name: str, world_size: int) -> None:
    whole, whole_buffers = gradients(0, name, 1)
    for found, buffers in run_on_ranks(gradients, world_size, name, world_size):
        assert found.keys() == whole.keys()
        for key, gradient in whole.items():
            scale = gradient.abs().max().clamp(min=1e-8)  # a bias before batch norm has a gradient of rounding alone
            assert (found[key] - gradient).abs().max() <= 1e-9 * max(1.0, scale.item()), key
            assert (found[key] - gradient).abs().max() <= 1e-7 * scale, f"{key}: relative"
        for key, value in whole_buffers.items():
            torch.testing.assert_close(buffers[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dino", "moco"])
def test_accumulated_batches_on_two_processes_follow_one(name: str, tmp_path: Path) -> None:
    """Queues, centres and a layer frozen for an epoch, where several batches make a step."""
    run = tiny(name, engine__accumulate=2)
    lines = {devices: trained_on(devices, run, tmp_path) for devices in (1, 2)}
    same_losses(lines[1], lines[2], steps=6)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_training_on_two_processes_follows_one(name: str, tmp_path: Path) -> None:
    """The command itself, with Lightning's DDP: same folder, same losses to rounding, one writer."""
    run = tiny(name, schedule__epochs=1, online__every_epochs=1, online__images=32)
    lines = {devices: trained_on(devices, run, tmp_path) for devices in (1, 2)}
    for devices, written in lines.items():
        assert (tmp_path / f"on-{devices}" / "encoder.safetensors").exists()
        assert sum("rankme" in line for line in written) == 1, "one rank measures"
    same_losses(lines[1], lines[2], steps=6)
