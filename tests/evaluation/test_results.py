"""Results on disk: whole or not there, with the outcomes that are theirs, each encoder's in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mvmr.evaluation.results as module
from mvmr.errors import RunError, UserError
from mvmr.evaluation.results import folders_of, read_result, write_result
from mvmr.types import Result


def result(fingerprint: str, value: float = 1.0, *, outcomes: bool = True) -> Result:
    own = {"top1": torch.full((4,), value)} if outcomes else {}
    return Result("knn", "digits", "test", {"top1": value}, {"k": 3}, "e", 0.5, fingerprint, own)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results/knn-digits.json"
    write_result(path, result("one"))
    found = read_result(path, "one")
    assert found == result("one")
    assert found.outcomes["top1"].tolist() == [1.0] * 4
    assert read_result(path, "two") is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["knn-digits.json", "knn-digits.safetensors"]


def test_a_kill_leaves_no_result_beside_anothers_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "knn-digits.json"
    write_result(path, result("one"))
    whole = module.write_bytes

    def killed(file: Path, content: bytes, **rest: str) -> None:
        if file.suffix == ".json":
            raise KeyboardInterrupt
        whole(file, content, **rest)

    monkeypatch.setattr(module, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_result(path, result("two", 2.0))
    assert json.loads(path.read_text())["fingerprint"] == "one"
    assert read_result(path, "one") is None  # its outcomes are gone
    assert read_result(path, "two") is None


def test_a_result_without_outcomes_has_none_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "knn-digits.json"
    write_result(path, result("one"))
    write_result(path, result("two", outcomes=False))
    found = read_result(path, "two")
    assert found is not None
    assert dict(found.outcomes) == {}
    write_result(path, result("one"))

    def killed(*arguments: object, **rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_result(path, result("one", outcomes=False))
    assert read_result(path, "one") is None


def test_without_a_fingerprint_nothing_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "knn-digits.json"
    write_result(path, result(""))
    assert path.is_file()
    assert read_result(path, "") is None


def test_damaged_files_are_no_result(tmp_path: Path) -> None:
    path = tmp_path / "knn-digits.json"
    write_result(path, result("one"))
    path.with_suffix(".safetensors").write_bytes(b"x")
    assert read_result(path, "one") is None
    path.write_text(json.dumps([1]))
    assert read_result(path, "one") is None


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("no folder")
    with pytest.raises(RunError, match=r"results/knn-digits.*cannot be written.*name another --out"):
        write_result(tmp_path / "results/knn-digits.json", result("one"))


def test_every_encoder_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert folders_of(["runs/a", "timm:x", "données", "../b"], tmp_path) == [
        tmp_path / name for name in ("runs-a", "timm-x", "données", "b")
    ]
    for one, other in (("runs/a", "runs-a"), ("Runs/a", "runs-a"), ("!", "?")):
        with pytest.raises(UserError, match=r"would both lie in .* evaluate them one by one"):
            folders_of([one, other], tmp_path)
