"""mvmr splits: what it writes and says."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from mvmr.cli.splits import splits
from mvmr.data.coco import read_instances
from mvmr.types import UserError
from scene_files import write_coco

app = typer.Typer()
app.command()(splits)


def test_splits(tmp_path: Path) -> None:
    file = write_coco(tmp_path, train=7) / "annotations" / "instances_train2017.json"
    words = [str(file), "--size", "2", "--count", "3", "--seed", "4", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["size"], told["seed"], len(told["files"])) == (2, 4, 3)
    assert [len(read_instances(Path(made)).images) for made in told["files"]] == [2, 2, 2]
    done = CliRunner().invoke(app, [*words, "--rest"])
    assert done.stdout == ""  # what people read goes to standard error
    assert "seed4-rest.json" in done.stderr
    assert len(read_instances(tmp_path / "out" / "instances_train2017-2-seed4-rest.json").images) == 1


def test_too_few(tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    done = CliRunner().invoke(app, [str(file)])
    assert isinstance(done.exception, UserError)
    assert "--size 1000 --count 5: 5000 images are wanted and 6 are there" in str(done.exception)
