"""The command, as tests run it: in their own process, or trained in processes of its own on one or two devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from killing import finish
from mvmr.config import Run

Command = Callable[..., tuple[int, str, str]]
"""The `command` fixture of tests/cli: mvmr(*words) -> (exit status, standard output, standard error)."""


def trained_on(devices: int, run: Run, folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after `mvmr train` on so many CPU processes, into folder/on-DEVICES."""
    recipe, out = folder / "recipe.yaml", folder / f"on-{devices}"
    recipe.write_text(yaml.safe_dump(run.resolved()))
    if devices == 1:
        finish(recipe, out, "engine.devices=1")
    else:  # Lightning starts the other process with this one's command
        words = [sys.executable, "-m", "mvmr", "train", str(recipe), f"engine.devices={devices}", "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_losses(one: list[dict[str, Any]], two: list[dict[str, Any]], *, steps: int) -> None:
    """Assert that two runs have met the same losses, to rounding."""
    first, second = ([line["train/loss"] for line in lines if "train/loss" in line] for lines in (one, two))
    assert len(first) == steps
    assert second == pytest.approx(first, rel=1e-3, abs=1e-4)
