"""`mvmr tune` and `mvmr train --auto-bs --auto-lr` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from commands import Command
from mvmr.cli.tune import curve
from mvmr.engine import tune as tune_module
from tiny import tiny


@pytest.fixture
def command(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command in a folder with recipe.yaml, and a range test of a few steps."""
    monkeypatch.setattr(tune_module, "RATES", 22)
    run = tiny(schedule__epochs=1, representations={"pixels": {}}, views__size=8)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run.resolved()))
    return command


@pytest.mark.filterwarnings("ignore:the loss fell at no rate")
def test_tune_then_train(command: Command, tmp_path: Path) -> None:
    status, out, err = command("tune", "recipe.yaml", "data.limit=64", "--max-batch-size", "32")
    assert status == 0, err
    assert "data.batch_size: 32 (--max-batch-size is 32)" in out
    assert "optimizer.lr: " in out
    assert "next: mvmr train tiny.tuned.yaml" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "tiny.tuned.json", "tiny.tuned.yaml"]
    record = json.loads((tmp_path / "tiny.tuned.json").read_text())
    assert [trial["batch_size"] for trial in record["batch_size"]["trials"]] == [16, 32]
    assert len(record["lr"]["rates"]) == len(record["lr"]["losses"]) == 22

    status, _, err = command("train", "tiny.tuned.yaml", "--out", "runs/a")
    assert status == 0, err
    settings = yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())
    assert (settings["data"]["batch_size"], settings["data"]["limit"]) == (32, 64)


def test_one_search_with_json(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("tune", "recipe.yaml", "optimizer.lr=auto", "--batch-size", "--json", "--out", "a/b.yaml")
    assert status == 0
    found = json.loads(out)
    assert (found["file"], found["curves"]) == ("a/b.yaml", "a/b.json")
    assert found["batch_size"]["found"] == 64
    assert "lr" not in found
    assert yaml.safe_load((tmp_path / "a/b.yaml").read_text())["optimizer"]["lr"] == "auto"


@pytest.mark.filterwarnings("ignore:the loss fell at no rate")
def test_train_tunes_first_if_asked(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "suggest", lambda rates, losses: 0.0007)
    status, out, err = command("train", "recipe.yaml", "--auto-bs", "--auto-lr", "--out", "runs/a")
    assert (status, out) == (0, ""), err
    assert "tuned: data.batch_size=64, optimizer.lr=0.0007, see runs/a/tuned.yaml" in err
    folder = tmp_path / "runs/a"
    assert (folder / "encoder.safetensors").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text()) == yaml.safe_load((folder / "tuned.yaml").read_text())
    assert json.loads((folder / "tuned.json").read_text())["lr"]["found"] == 0.0007

    status, _, err = command("train", "recipe.yaml", "--auto-lr", "--out", "runs/a")
    assert status == 2
    assert "runs/a already holds a run" in err
    status, _, err = command("train", "recipe.yaml", "--auto-bs", "--auto-lr", "--resume", "--out", "runs/a")
    assert status == 2
    assert "leave out --auto-bs and --auto-lr" in err


def test_mistakes_have_status_two(command: Command) -> None:
    for words, said in (
        (("--max-batch-size", "1"), "--max-batch-size 1"),
        (("engine.devices=2",), "engine.devices=1"),
        (("optimizer.layer_decay=2",), "optimizer.layer_decay"),
    ):
        status, out, err = command("tune", "recipe.yaml", *words)
        assert (status, out) == (2, "")
        assert said in err


def test_the_curve_that_is_shown() -> None:
    rates = [float(i) for i in range(1, 101)]
    rows = curve(rates, [5.0] * 50 + [2.0] * 50)
    assert len(rows) == 20
    assert rows[0] == ["1.0e+00", "5", "#" * 30]
    assert rows[-1] == ["9.6e+01", "2", ""]
    assert curve([1.0], [3.0]) == [["1.0e+00", "3", ""]]
    assert curve([], []) == []
