"""The commands as a user types them: results on standard output, messages on standard error, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from commands import Command


def test_help_answers_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv = ['mvmr', '--help']\n"
        "from mvmr.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'numpy', 'sklearn', 'timm', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = "demo train tune evaluate rank pictures embed export splits cache list doctor"
    for name in commands.split():
        assert name in done.stdout


@pytest.mark.parametrize("kind", ["methods", "data", "recipes", "representations", "views", "evaluations"])
def test_list(kind: str, command: Command) -> None:
    status, out, _ = command("list", kind, "--json")
    assert status == 0
    names = json.loads(out)[kind]
    assert len(names) >= 1
    assert all(text and len(text) < 160 for text in names.values())
    status, out, _ = command("list", kind)
    assert status == 0
    assert all(name in out for name in names)


def test_train_evaluate_embed(command: Command, recipe: Path, tmp_path: Path) -> None:
    status, out, err = command("train", recipe, "data.limit=64", "--out", "runs/a")
    assert (status, out) == (0, ""), err
    assert "next: mvmr evaluate runs/a" in err
    assert (tmp_path / "runs/a/encoder.safetensors").exists()
    assert yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())["data"]["limit"] == 64

    status, out, err = command(
        "evaluate", "runs/a", "--on", "knn,linear_fast", "linear_fast.labels_per_class=5", "--random", "--json"
    )
    assert status == 0, err
    results = json.loads(out)["results"]
    assert [(r["encoder"], r["evaluation"]) for r in results] == [
        ("runs/a", "knn"), ("runs/a", "linear_fast"), ("random", "knn"), ("random", "linear_fast"),
    ]  # fmt: skip
    assert all(r["data"] == "digits" and r["split"] == "test" and 0 <= r["metrics"]["top1"] <= 100 for r in results)
    assert results[1]["settings"]["labels_per_class"] == 5
    written = json.loads((tmp_path / "runs/a/results/knn-digits.json").read_text())
    assert written == results[0]

    status, out, err = command("evaluate", "runs/a/encoder.safetensors", "--data", "digits")
    assert status == 0, err
    assert "top1" in out

    status, out, err = command("embed", "runs/a", "--split", "test", "--out", "features.npz", "--json")
    assert status == 0, err
    assert json.loads(out) == {"file": "features.npz", "images": 500, "dim": 64, "labels": True}
    with np.load(tmp_path / "features.npz", allow_pickle=False) as file:
        assert file["features"].shape == (500, 64)
        assert file["features"].dtype == np.float32
        assert set(file["labels"]) == set(range(10))
        assert len(file["classes"]) == 10


def test_written_config_repeats_the_run(command: Command, recipe: Path, tmp_path: Path) -> None:
    assert command("train", recipe, "--out", "runs/a")[0] == 0
    assert command("train", "runs/a/config.yaml", "--out", "runs/b")[0] == 0
    first, second = ((tmp_path / f"runs/{name}/encoder.safetensors").read_bytes() for name in "ab")
    assert first == second
    status, _, err = command("train", "runs/a/config.yaml")
    assert status == 2
    assert "--resume" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "mvmr_digit"], "did you mean mvmr_digits?"),
        (["train", "no_such.yaml"], "no_such.yaml"),
        (["train", "mvmr_digits", "schedule.epoch=3"], "schedule.epoch: no such key (did you mean epochs?)"),
        (["train", "mvmr_digits", "schedule.epochs"], "key.sub=value"),
        (["train", "mvmr_digits", "schedule.epochs=many"], "schedule.epochs"),
        (["train", "mvmr_digits", "method.powr=1"], "method.powr: no such key (did you mean power?)"),
        (["train", "mvmr_digits", "method.name=simclrr"], "method.name"),
        (["train", "mvmr_digits", "views.crops.augmented.crop.scal=[0.1,1]"], "did you mean scale?"),
        (["train", "mvmr_digits", "views.recipe=mvmrr"], "mvmr_cifar20"),
        (["train", "mvmr_digits", "representations.hog.bin=3"], "representations.hog.bin"),
        (["train", "mvmr_digits", "representations.hogg.bins=3"], "hog"),
        (["train", "mvmr_digits", "method.beta.wavelets=3"], "method.beta names wavelets"),
        (["train", "mvmr_digits", "encoder.name=resnet19"], "resnet18"),
        (["train", "mvmr_digits", "data.name=cifar11"], "data.name"),
        (["train", "mvmr_digits", "data.batch_size=5000"], "data.batch_size"),
        (["train", "mvmr_folder"], "data.root"),
        (["train", "mvmr_folder", "data.root=nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "torchvision:resnet18@random"], "--data"),
        (["evaluate", "torchvision:resnet18@random", "--data", "digit"], "digits"),
        (["evaluate", "torchvision:resnet18@random", "--data", "digits", "--on", "knnn"], "knn"),
        (["evaluate", "torchvision:resnet18@random", "--data", "digits", "knn.kk=3"], "knn.kk"),
        (["embed", "torchvision:resnet18@random", "--data", "digits", "--out", "x.txt"], ".npz"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(words: list[str], said: str, command: Command, tmp_path: Path) -> None:
    status, out, err = command(*words)
    assert status == 2, err
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_all_mistakes_at_once(command: Command) -> None:
    status, _, err = command("train", "mvmr_digits", "schedule.epochs=0", "data.batch=3", "engine.precision=8")
    assert status == 2
    assert "3 mistakes" in err
    for key in ("schedule.epochs", "data.batch", "engine.precision"):
        assert key in err


def test_a_representation_set_to_null_is_left_out(command: Command, recipe: Path, tmp_path: Path) -> None:
    status, _, err = command("train", recipe, "representations.hog=null", "--out", "runs/a")
    assert status == 0, err
    assert set(yaml.safe_load((tmp_path / "runs/a/config.yaml").read_text())["representations"]) == {
        "pixels", "augmented_pixels",
    }  # fmt: skip


def test_doctor(command: Command) -> None:
    status, out, err = command("doctor", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["training step"] == "works"
    assert "torch" in found["libraries"]


def test_demo_names_are_free(tmp_path: Path) -> None:
    from mvmr.cli.demo import free_name

    assert free_name(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_name(tmp_path / "demo") == tmp_path / "demo-3"
