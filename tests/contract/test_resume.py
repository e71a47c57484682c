"""A run killed with SIGKILL and resumed ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from killing import finish, kill_at
from mvmr.methods import METHODS
from tiny import tiny


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ninety-six real digits as files of differing sizes, decoded by workers."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(load_digits().images[:96]):
        side = 16 + i % 5
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((side, side + i % 3)).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_killed_inside_an_epoch(name: str, workers: int, images: Path, tmp_path: Path) -> None:
    data = {
        "name": "images", "root": str(images), "batch_size": 16, "workers": workers, "store": "files",
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    run = tiny(name, data=data, engine__checkpoint_every_steps=2, schedule__epochs=3)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(run.resolved()))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(config, whole)
    # Six steps an epoch: step 9 is inside the second.
    assert kill_at(9, config, killed)[0] == -signal.SIGKILL
    assert not (killed / "encoder.safetensors").exists()
    finish(config, killed, "--resume")
    check_same_end(whole, killed)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_killed_with_a_checkpoint_at_epoch_ends_only(name: str, tmp_path: Path) -> None:
    run = tiny(name, schedule__epochs=3)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(run.resolved()))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(config, whole)
    assert kill_at(8, config, killed)[0] == -signal.SIGKILL
    finish(config, killed, "--resume")
    check_same_end(whole, killed)


def test_interrupted_from_the_keyboard(tmp_path: Path) -> None:
    run = tiny(schedule__epochs=300)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(run.resolved()))
    status, error = kill_at(8, config, tmp_path / "run", signal.SIGINT)
    assert status == 1
    assert "interrupted at step" in error
    assert f"mvmr train {tmp_path / 'run/config.yaml'} --resume" in error
    assert "Traceback" not in error


def check_same_end(whole: Path, killed: Path) -> None:
    expected, found = load_file(whole / "encoder.safetensors"), load_file(killed / "encoder.safetensors")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value.equal(found[key]), key
    losses = [[line["train/loss"] for line in lines_of(out) if "train/loss" in line] for out in (whole, killed)]
    assert losses[0] == losses[1], "metrics.jsonl tells the same story, without gaps or repeats"


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
