"""Five hundred files of every format people have, and some that are no images: nothing is lost, nothing is hidden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.image_files import write_mixed
from tiny import tiny


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Path]]:
    root = tmp_path_factory.mktemp("mixed") / "photos"
    good, bad = write_mixed(root, count=500)
    assert len(good) + len(bad) == 500
    assert len(bad) > 5
    return root, good, bad


def mvmr_train(tree: Path, out: Path, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    data = {"name": "images", "root": str(tree), "batch_size": 64, "workers": 2, "cache": str(tmp_path / "cache")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny(data=data, schedule__epochs=1).resolved()))
    return subprocess.run(
        [sys.executable, "-m", "mvmr", "train", str(recipe), "--out", str(out), *more],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_run_finishes_and_lists_exactly_the_bad_files(
    tree: tuple[Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    root, good, bad = tree
    out = tmp_path / "run"
    done = mvmr_train(root, out, tmp_path, "data.max_unreadable=0.1")
    assert done.returncode == 0, done.stderr
    listed = [line.split("\t") for line in (out / "unreadable.txt").read_text().splitlines()]
    assert sorted(path for path, _ in listed) == sorted(map(str, bad))
    assert all(reason for _, reason in listed)
    assert f"{len(bad)} unreadable files are left out" in done.stderr
    assert (out / "encoder.safetensors").exists()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(good) // 64


def test_at_the_default_it_stops_before_training(tree: tuple[Path, list[Path], list[Path]], tmp_path: Path) -> None:
    root, _, bad = tree
    out = tmp_path / "run"
    done = mvmr_train(root, out, tmp_path)
    assert done.returncode == 2
    assert "data.max_unreadable" in done.stderr
    assert str(len(bad)) in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
