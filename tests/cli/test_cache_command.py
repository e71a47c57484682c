"""mvmr cache: what it lists, and what it removes."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from commands import Command
from mvmr.cli.cache import in_bytes
from mvmr.data.files import locked
from mvmr.data.images import ArraySource
from mvmr.data.store import prepare
from mvmr.representations import build_representations
from mvmr.representations.cache import CacheConfig, CacheRequest, cache_representations


@pytest.fixture
def command(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """mvmr cache(*words), with an empty default folder."""
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "default"))
    return partial(command, "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two representations of 20 images, and an array."""
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ArraySource(pixels, None, name="own/train")
    request = CacheRequest(
        size=32, mean=(0.5,) * 3, std=(0.2,) * 3, folder=tmp_path / "cache", device=torch.device("cpu")
    )  # fmt: skip
    kinds = build_representations({"hog": {}, "local_std": {}})
    cache_representations(source, kinds, CacheConfig(width=2048), request=request)
    prepare(source, size=16, cache=tmp_path / "cache")
    return tmp_path / "cache"


def listed(command: Command, folder: Path) -> dict:
    status, out, err = command("list", "--folder", folder, "--json")
    assert status == 0, err
    return json.loads(out)


def test_list(command: Command, folder: Path) -> None:
    found = listed(command, folder)
    assert found["folder"] == str(folder)
    hog, local_std = found["representations"]
    assert (hog["kind"], hog["name"], hog["data"], hog["images"]) == ("HOG", "hog", "own/train", 20)
    assert (hog["width"], hog["projected_from"], hog["dtype"], hog["complete"]) == (1152, None, "float16", True)
    assert (local_std["width"], local_std["projected_from"]) == (2048, 3072)
    assert local_std["bytes"] > 20 * 2048 * 2
    assert found["others"]["arrays"] >= 20 * 3 * 16 * 16
    assert found["bytes"] == hog["bytes"] + local_std["bytes"] + sum(found["others"].values())

    next((folder / "representations" / hog["key"]).glob("shard-*")).unlink()
    assert [entry["complete"] for entry in listed(command, folder)["representations"]] == [False, True]


def test_the_table_names_everything(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    keys = [entry["key"] for entry in listed(command, folder)["representations"]]
    status, out, err = command("list", "--folder", folder)
    assert status == 0
    for word in (keys[0][:8], keys[1][:8], "HOG", "own/train", "of 3072 float16", "arrays", "checks", "scans"):
        assert word in out
    assert "in all" in err
    assert "unfinished" not in out
    next((folder / "representations" / keys[0]).glob("shard-*")).unlink()
    assert "unfinished" in command("list", "--folder", folder)[1]


def test_an_empty_default_folder(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("list", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["folder"], found["representations"], found["bytes"]) == (str(tmp_path / "default"), [], 0)
    status, _, err = command("clear")
    assert status == 0
    assert "0 cached representations removed, 0 B freed" in err


def test_clear_one_by_the_beginning_of_its_key(command: Command, folder: Path) -> None:
    hog, local_std = listed(command, folder)["representations"]
    status, out, err = command("clear", hog["key"][:12], "--folder", folder, "--json")
    assert status == 0, err
    assert json.loads(out) == {"folder": str(folder), "cleared": [hog["key"]], "bytes": hog["bytes"]}
    assert listed(command, folder)["representations"] == [local_std]
    assert not (folder / "representations" / hog["key"]).exists()


def test_clear_all_and_everything(command: Command, folder: Path) -> None:
    before = listed(command, folder)
    status, out, err = command("clear", "--folder", folder)
    assert (status, out) == (0, "")
    assert "2 cached representations removed" in err
    after = listed(command, folder)
    assert after["representations"] == []
    assert after["others"] == before["others"]
    status, out, _ = command("clear", "--everything", "--folder", folder, "--json")
    assert status == 0
    assert json.loads(out)["bytes"] == before["others"]["arrays"]
    assert listed(command, folder)["bytes"] == 0


def test_what_is_being_made_is_left(command: Command, folder: Path) -> None:
    hog, local_std = listed(command, folder)["representations"]
    (array,) = (path for path in (folder / "arrays").iterdir() if path.is_dir())
    with locked(folder / "representations" / hog["key"]), locked(array), warnings.catch_warnings():
        warnings.simplefilter("always")
        status, out, err = command("clear", "--everything", "--folder", folder, "--json")
    assert err.count("is being made by another process: it is left") == 2
    assert status == 0
    assert json.loads(out) == {"folder": str(folder), "cleared": [local_std["key"]], "bytes": local_std["bytes"]}
    assert array.is_dir()


def test_mistakes(command: Command, folder: Path) -> None:
    keys = [entry["key"] for entry in listed(command, folder)["representations"]]
    for words, said in [
        (("clear", "xyz", "--folder", folder), "no key begins with 'xyz'; `mvmr cache list`"),
        (("clear", "", "--folder", folder), "2 keys begin"),
        (("clear", keys[0], "xyz", "--folder", folder), "xyz"),
        (("clear", keys[0], "--everything", "--folder", folder), "--everything"),
        (("list", "--folder", "nowhere"), "nowhere is not a folder"),
        (("clear", "--folder", "nowhere"), "nowhere is not a folder"),
    ]:
        status, out, err = command(*words)
        assert (status, out) == (2, ""), words
        assert said in err
    assert len(listed(command, folder)["representations"]) == 2
    assert not Path("nowhere").exists()


def test_sizes_in_words() -> None:
    assert [in_bytes(size) for size in (0, 999, 1536, 204_800_000, 5_247_664_128, 2 * 10**15)] == [
        "0 B", "999 B", "1.54 kB", "205 MB", "5.25 GB", "2e+03 TB",
    ]  # fmt: skip
