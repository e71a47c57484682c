from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from commands import Command
from mvmr.cli import main
from tiny import tiny


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """mvmr(*words) -> (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def mvmr(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mvmr", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return mvmr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that runs in a second."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny(schedule__epochs=1).resolved()))
    return path
