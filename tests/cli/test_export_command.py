"""mvmr export, as a user types it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from mvmr.cli.export import export
from mvmr.errors import UserError
from mvmr.nets.cards import EncoderCard
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.weights import save_encoder

app = typer.Typer()
app.command("export")(export)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = EncoderConfig(name="resnet18")
    net, dim = build_encoder(config)
    card = EncoderCard(encoder=config, dim=dim, image_size=224, mean=(0.5,) * 3, std=(0.25,) * 3, method="m", data="d",
                       version="0")  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    save_encoder(folder, net, card)
    return folder


def test_export_says_what_must_be_set(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "backbone.pkl"
    done = CliRunner().invoke(app, [str(run_folder), "--to", "detectron2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    for line in (f"{out}", "PIXEL_MEAN: [127.5, 127.5, 127.5]", "PIXEL_STD: [63.75, 63.75, 63.75]", 'FORMAT: "RGB"',
                 "STRIDE_IN_1X1: False"):  # fmt: skip
        assert line in done.stderr
    assert len(pickle.loads(out.read_bytes())["model"]) == 120


def test_json_is_alone_on_standard_output(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pth"
    done = CliRunner().invoke(app, [str(run_folder), "--to", "torchvision", "--out", str(out), "--json"])
    told = json.loads(done.stdout)
    assert told["file"] == str(out)
    assert told["tensors"] == len(torch.load(out, weights_only=True)) == 120
    assert "net.load_state_dict" in told["notes"]


def test_mistakes_are_user_errors(run_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(run_folder), "--to", "keras", "--out", str(tmp_path / "a.h5")])
    assert isinstance(done.exception, UserError)
    assert "known: torchvision, detectron2" in str(done.exception)
