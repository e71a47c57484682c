"""Encoders beside each other on the command line: a run's epochs ranked, several evaluated, pictures of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import Command
from mvmr.data.sources import DataConfig, open_source
from mvmr.nets.weights import read_card
from mvmr.ops.random import permutation


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

    short = ("diagnostics.view_images=16", "diagnostics.views=2", "diagnostics.images=64")
    status, out, err = command("rank", run, *short, "--json")
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


def test_images_without_labels_are_ranked_by(command: Command, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(10):
        grey = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(grey).convert("RGB").save(folder / f"{number}.png")
    short = ("diagnostics.view_images=8", "diagnostics.views=2", "--data", "images", "--root", folder)
    status, out, err = command("rank", run, "--probe", "none", *short, "--json")
    assert status == 0, err
    ranked = json.loads(out)
    assert set(ranked["rankings"]["rankme"]["order"]) == {"epoch-0001", "epoch-0002"}
    assert ranked["accuracies"] is None
    status, out, err = command("evaluate", run, "--on", "diagnostics", *short, "--json")
    assert status == 0, err
    assert json.loads(out)["results"][0]["split"] == "pretrain"


def test_tables_have_intervals_and_differences(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    status, out, err = command("evaluate", "runs/a", "--random", "--on", "knn")
    assert status == 0, err
    files = [run / f"results/knn-digits{end}.json" for end in ("", "-random")]
    own, random = (json.loads(file.read_text())["metrics"] for file in files)
    shown = " ".join(out.split())
    for metrics in (own, random):
        assert f"{metrics['top1']:.2f} [{metrics['top1_low']:.2f}, {metrics['top1_high']:.2f}]" in shown
    assert "ahead of runs/a" in shown
    assert f"{random['top1'] - own['top1']:+.2f} [" in shown


def test_pictures(command: Command, run: Path, tmp_path: Path) -> None:
    words = ("--images", "2", "--k", "3")
    sheets = {}
    for kind in ("neighbours", "cam"):
        status, _, err = command("pictures", run, kind, "--out", f"new/{kind}.png", *words)
        assert status == 0, err
        with Image.open(tmp_path / f"new/{kind}.png") as sheet:
            sheets[kind] = sheet.convert("RGB")
    # Two rows of a query and its three nearest, of 96 pixels with a line of text; image, map, both, and the other one.
    near = sheets["neighbours"]
    assert near.width // 96 == sheets["cam"].width // (sheets["cam"].height // 2) == 4
    assert near.height // (96 + 14) == 2
    # What is shown are the test images that the seed draws, brought to the encoder's size.
    test = open_source(DataConfig(), "test", size=16)
    for row, position in enumerate(permutation(0, 0, len(test))[:2].tolist()):
        left = np.asarray(near)[row * (near.height + 4) // 2 :, :96][:96].mean((0, 1))
        assert left == pytest.approx(test.images[position].float().mean((1, 2)).numpy(), abs=12)
    status, _, err = command("pictures", run, "neighbours", "--out", "new/other.png", *words, "--seed", "1")
    assert status == 0, err
    assert (tmp_path / "new/other.png").read_bytes() != (tmp_path / "new/neighbours.png").read_bytes()
    status, _, err = command(
        "pictures", "representation:pixels", "neighbours", "--data", "digits", "--out", "pixels.png", *words
    )
    assert status == 0, err
    status, _, err = command("pictures", run, "attention", "--out", "attention.png")
    assert status == 2
    assert "vision transformers" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank", "runs/a"], "runs/a: keeps 0 encoders"),
        (["rank", "a", "b", "--online"], "--online reads one run"),
        (["rank", "runs/a", "--online", "knn.k=3"], "knn.k: no effect with --online"),
        (["rank", "knn.k=3"], "RUN is missing"),
        (
            ["rank", "a", "b", "--probe", "clustering"],
            "--probe clustering: has no top1 to compare with; take one of knn,",
        ),
        (["evaluate", "knn.k=3"], "ENCODER is missing"),
        (["pictures", "representation:pixels", "cam", "--data", "digits", "--out", "runs"], "runs: is a folder"),
    ],
)
def test_mistakes(command: Command, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    status, _, err = command(*words)
    assert status == 2
    assert said in err
