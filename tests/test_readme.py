"""Every command and every Python example of the README is run, at a smaller size where it says how large it is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

# What makes a training command short. Later overrides win, so the command itself is run as it is printed.
SHORT = [
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "views.size=16",
    "method.projector=[16]",
    "data.batch_size=16",
    "representations.hog.cell=4",
    "encoder.width=0.125",
    "online.images=16",
    "engine.accelerator=cpu",
]
# Where the data cannot be had without a download, the recipe is run on digits.
ON_DIGITS = ["data.name=digits", "data.root=null", "data.limit=64"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with YOUR_IMAGES in it: digits in class folders."""
    folder = tmp_path_factory.mktemp("desk")
    digits = load_digits()
    for i in range(120):
        path = folder / "YOUR_IMAGES" / f"digit_{digits.target[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype("uint8")).resize((20, 20)).save(path)
    return folder


def run(words: list[str], folder: Path, timeout: int = 400) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "MVMR_CACHE": str(folder / "cache"), "PATH": path}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def test_every_mvmr_command_runs_in_order(desk: Path) -> None:
    known = [command for command in commands() if command.startswith("mvmr ")]
    assert len(known) >= 6
    for command in known:
        words = shlex.split(command)
        if words[1] in ("train", "tune"):
            words += SHORT + (ON_DIGITS if "DIR" in command else [])
        run(words, desk)


def test_python_examples_run_in_order(desk: Path) -> None:
    code = "\n".join(blocks("python"))
    assert len(blocks("python")[0].splitlines()) <= 12
    short = code.replace('schedule={"epochs": 5}', 'schedule={"epochs": 1}, data={"limit": 256}')
    assert short != code
    # The second example loads what the commands trained; a net of full width stands in for it here.
    setup = """
from pathlib import Path
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.weights import EncoderCard, save_encoder
encoder, dim = build_encoder(EncoderConfig())
card = EncoderCard(encoder=EncoderConfig(), dim=dim, image_size=96, mean=(0, 0, 0), std=(1, 1, 1), method="mvmr",
                   data="images", version="0")
Path("runs/mvmr_folder").mkdir(parents=True, exist_ok=True)
save_encoder("runs/mvmr_folder", encoder, card)
"""
    run([sys.executable, "-c", setup + short], desk)


def test_make_targets_do_what_the_readme_says() -> None:
    made = [command for command in commands() if command.startswith("make ")]
    assert made == ["make demo", "make test"]
    for command in made:
        done = subprocess.run(
            [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert ("mvmr demo" if "demo" in command else "pytest") in done.stdout


def test_demo_as_make_runs_it(tmp_path: Path) -> None:
    """What `make demo` runs once installed, to its end."""
    run(["mvmr", "demo"], tmp_path)
    assert (tmp_path / "runs/demo/encoder.safetensors").exists()


def test_no_command_goes_untested() -> None:
    assert all(command.startswith(("mvmr ", "make ")) for command in commands())
