"""Encoders beside each other on the command line: a run's epochs ranked, several evaluated, pictures of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from commands import Command
from mvmr.nets.weights import read_card


@pytest.fixture
def run(command: Command, recipe: Path, tmp_path: Path) -> Path:
    """A run that kept the encoders of its two epochs."""
    status, _, err = command(
        "train", recipe, "data.limit=64", "schedule.epochs=2", "engine.keep_every_epochs=1", "online.every_epochs=1",
        "online.knn_every_epochs=1", "--out", "runs/a",
    )  # fmt: skip
    assert status == 0, err
    return tmp_path / "runs/a"


def test_epochs_are_kept_evaluated_and_ranked(command: Command, run: Path) -> None:
    kept = sorted((run / "checkpoints").glob("epoch-*.safetensors"))
    assert [path.name for path in kept] == ["epoch-0001.safetensors", "epoch-0002.safetensors"]
    assert kept[1].read_bytes() == (run / "encoder.safetensors").read_bytes() != kept[0].read_bytes()
    assert read_card(kept[0]) == read_card(run)

    status, out, err = command("evaluate", *kept, "--on", "knn,linear_fast", "linear_fast.l2=10", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [r["encoder"] for r in found["results"]] == [str(kept[0])] * 2 + [str(kept[1])] * 2
    assert all(r["data"] == "digits" for r in found["results"])  # the run's own
    first, second = (r["metrics"] for r in found["results"] if r["evaluation"] == "knn")
    difference = next(d for d in found["differences"] if (d["evaluation"], d["metric"]) == ("knn", "top1"))
    assert (difference["encoder"], difference["against"]) == (str(kept[1]), str(kept[0]))
    assert difference["difference"] == pytest.approx(second["top1"] - first["top1"])
    assert difference["low"] <= difference["difference"] <= difference["high"]

    status, out, err = command("rank", run, "--json")
    assert status == 0, err
    ranked = json.loads(out)
    assert set(ranked["diagnostics"]) == {"epoch-0001", "epoch-0002"}
    assert ranked["accuracies"] == pytest.approx({"epoch-0001": first["top1"], "epoch-0002": second["top1"]})
    assert set(ranked["rankings"]["rankme"]["order"]) == {"epoch-0001", "epoch-0002"}

    status, out, err = command("rank", run, "--online", "--json")
    assert status == 0, err
    assert set(json.loads(out)["diagnostics"]) == {"epoch-0001", "epoch-0002"}
    status, out, err = command("rank", run, "--online", "--probe", "none")
    assert status == 0, err
    assert "rankme" in out
    status, _, err = command("evaluate", run / "checkpoints" / "epoch-0001.ckpt", "--data", "digits")
    assert status == 2
    assert "epoch-0001.safetensors" in err


def test_tables_have_intervals_and_differences(command: Command, run: Path) -> None:
    status, out, err = command("evaluate", run, "--random", "--on", "knn")
    assert status == 0, err
    assert "[" in out
    assert "ahead of" in out
    assert (run / "results/knn-digits.json").is_file()
    assert (run / "results/knn-digits-random.json").is_file()


def test_pictures(command: Command, run: Path, tmp_path: Path) -> None:
    for kind in ("neighbours", "cam"):
        status, _, err = command("pictures", run, kind, "--out", f"{kind}.png", "--images", "2", "--k", "3")
        assert status == 0, err
        with Image.open(tmp_path / f"{kind}.png") as sheet:
            assert min(sheet.size) > 16
    status, _, err = command("pictures", run, "attention", "--out", "attention.png")
    assert status == 2
    assert "vision transformers" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank", "runs/a"], "runs/a: keeps 0 encoders"),
        (["rank", "a", "b", "--online"], "--online reads one run"),
        (["evaluate", "knn.k=3"], "ENCODER is missing"),
    ],
)
def test_mistakes(command: Command, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    status, _, err = command(*words)
    assert status == 2
    assert said in err
