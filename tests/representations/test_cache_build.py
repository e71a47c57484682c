"""Building the cache of representations: killed, on several processes and ranks, and on a full disk."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from mvmr.data.images import ArraySource
from mvmr.errors import RunError
from mvmr.representations import build_representations, cache_store
from mvmr.representations.base import Representation, fixed
from mvmr.representations.cache import CacheConfig, CachedRows, CacheRequest, cache_representations
from ranks import run_on_ranks

cache = importlib.import_module("mvmr.representations.cache")
SETTINGS: dict[str, dict[str, Any]] = {"hog": {"cell": 4}, "local_std": {}}


class Counting(Representation):
    """The means of the rows; counts its images, and gives what is not finite from number `bad_from` on."""

    def __init__(self, bad_from: int = 10**9):
        super().__init__()
        self.images, self.bad_from = -1, bad_from  # one is spent on finding the width

    def fingerprint(self) -> str:
        return "of counting"

    @fixed
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        self.images += len(images)
        return images.mean(3).flatten(1) if self.images <= self.bad_from else images.mean(3).flatten(1) * float("nan")


def pictures(images: int) -> ArraySource:
    pixels = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArraySource(pixels, None, name="own/train")


def build(
    folder: Path, images: int, representations: nn.ModuleDict | None = None, **more: Any
) -> dict[str, CachedRows]:
    asked = {"size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "folder": folder, "batch_size": 4, **more}
    chosen = build_representations(SETTINGS) if representations is None else representations
    request = CacheRequest(device=torch.device("cpu"), **asked)
    return cache_representations(pictures(images), chosen, CacheConfig(width=64), request=request)


def shards(folder: Path) -> dict[str, bytes]:
    """{key/name: bytes}"""
    found = folder.glob("representations/*/shard-*")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if not file.name.endswith(".part")}


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("representations/*/*.part"))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "ROWS_PER_SHARD", 8)


# Forks, because loading torch takes seconds. Every child builds in a folder of its own and dies inside a write.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_cache_build as t
torch.set_num_threads(1)
t.cache_store.ROWS_PER_SHARD = 8
write, done = t.cache_store.ShardWriter.write, 0

def child(folder, last):
    def dies(writer, rows):
        global done
        done += 1
        if done == last:
            writer._file.write(rows.numpy().tobytes()[:777])
            writer._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(writer, rows)
    t.cache_store.ShardWriter.write = dies
    t.build(folder, 316)
    os._exit(0)

for number, last in enumerate(map(int, sys.argv[4:])):
    process = os.fork()
    if process == 0:
        child(Path(sys.argv[3]) / str(number), last)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")
def test_a_build_killed_at_any_point_is_completed_with_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "whole", 316)
    expected = shards(tmp_path / "whole")
    assert len(expected) == 80
    # 158 writes are made: two representations, 39 shards of two batches and one of one.
    points = sorted(torch.randperm(158, generator=torch.Generator().manual_seed(3))[:5].add(1).tolist())
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(here.parent), str(tmp_path), *map(str, points)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == 0, killed.stderr
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        whole = shards(folder)
        assert len(whole) == 2 * ((point - 1) // 4)
        assert parts(folder)
        times = {name: (folder / name).stat().st_mtime_ns for name in whole}
        made: list[tuple[str, int, int]] = []
        build(folder, 316, progress=lambda *now, made=made: made.append(now))
        assert shards(folder) == expected
        assert {name: (folder / name).stat().st_mtime_ns for name in whole} == times
        assert made[-1] == ("representations", *[316 - 8 * (len(whole) // 2)] * 2)
        assert parts(folder) == []


def built_alone(rank: int, folder: Path, locks: bool) -> tuple[int, Tensor]:
    """Builds without knowing of the other process; returns the images computed, and all rows."""
    cache_store.ROWS_PER_SHARD = 8
    counting = Counting()
    before = cache.locked
    try:
        if not locks:
            cache.locked = lambda _: nullcontext()
        distributed.barrier()
        rows = build(folder, 100, nn.ModuleDict({"x": counting}))["x"]
        return counting.images, rows(torch.arange(100))
    finally:
        cache.locked = before
        cache_store.ROWS_PER_SHARD = 1024


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_that_start_at_once_end_with_one_good_cache(tmp_path: Path, locks: bool) -> None:
    (first, rows), (second, others) = run_on_ranks(built_alone, 2, tmp_path, locks)
    assert torch.equal(rows, others)
    assert 100 <= first + second <= 200
    if locks:
        assert first + second == 100
    again = Counting()
    assert torch.equal(build(tmp_path, 100, nn.ModuleDict({"x": again}))["x"](torch.arange(100)), rows)
    assert again.images == 0
    assert parts(tmp_path) == []


def built_together(rank: int, folder: Path, bad_rank: int | None) -> tuple[int, Tensor | None]:
    """Builds as one of two ranks; None for the rows where this rank fails."""
    cache_store.ROWS_PER_SHARD = 8
    counting = Counting(bad_from=20) if rank == bad_rank else Counting()
    try:
        rows = build(folder, 100, nn.ModuleDict({"x": counting}), rank=rank, world_size=2, barrier=distributed.barrier)[
            "x"
        ]
        return counting.images, rows(torch.arange(100))
    except RunError:
        return counting.images, None
    finally:
        cache_store.ROWS_PER_SHARD = 1024


def test_two_ranks_share_the_work(tmp_path: Path) -> None:
    (first, rows), (second, others) = run_on_ranks(built_together, 2, tmp_path / "two", None)
    assert torch.equal(rows, others)
    assert (first, second) == (52, 48)  # 13 shards, the last one of 4 images
    alone = build(tmp_path / "one", 100, nn.ModuleDict({"x": Counting()}))["x"]
    assert torch.equal(alone(torch.arange(100)), rows)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_a_rank_that_fails_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    (computed, rows), (_, nothing) = run_on_ranks(built_together, 2, tmp_path, 1)
    assert nothing is None
    assert rows is not None
    assert rows.isfinite().all()
    assert computed == 100 - 16  # the other rank's whole shards are used
    assert parts(tmp_path) == []


def test_ranks_on_different_disks_each_end_with_a_whole_cache(tmp_path: Path) -> None:
    # Rank 1 of 2 alone: what rank 0 makes never appears here.
    counting = Counting()
    rows = build(tmp_path, 100, nn.ModuleDict({"x": counting}), rank=1, world_size=2)["x"]
    assert counting.images == 100
    assert torch.equal(
        rows(torch.arange(100)), build(tmp_path / "b", 100, nn.ModuleDict({"x": Counting()}))["x"](torch.arange(100))
    )


def test_too_little_room_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 316 * 64 * 2 * 2 + 80 * 32
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, needed - 1))
    counting = Counting()
    both = build_representations(SETTINGS)
    with pytest.raises(RunError, match=r"needs 8.35e-05 GB more.*data\.cache=DIR.*cache\.width.*cache=off"):
        build(tmp_path, 316, both)
    assert shards(tmp_path) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, needed))
    build(tmp_path, 316, both)
    # Only what is missing needs room.
    next(tmp_path.glob("representations/*/shard-00003")).unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 8 * 64 * 2 + 32))
    build(tmp_path, 316, both)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    build(tmp_path, 316, both)
    with pytest.raises(RunError):
        build(tmp_path, 316, nn.ModuleDict({"x": counting}))
    assert counting.images == 0


class FullDisk:
    """A file that takes the first `writes` writes of all such files."""

    def __init__(self, file: Any, budget: list[int]):
        self.file, self.budget = file, budget

    def write(self, data: Any) -> int:
        self.budget[0] -= 1
        if self.budget[0] < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("writes", [0, 1, 5, 31, 32])
def test_a_disk_that_fills_up_leaves_whole_shards_only(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", 50)
    budget = [writes]

    def filling(path: Path, mode: str) -> Any:
        return FullDisk(open(path, mode), budget) if mode == "xb" else open(path, mode)

    monkeypatch.setattr(cache_store, "open", filling, raising=False)
    with pytest.raises(RunError, match=r"No space left on device\).*data\.cache=DIR.*cache\.width.*cache=off"):
        build(tmp_path / "full", 50)
    monkeypatch.undo()
    monkeypatch.setattr(cache_store, "ROWS_PER_SHARD", 8)
    expected, kept = shards(tmp_path / "whole"), shards(tmp_path / "full")
    assert parts(tmp_path / "full") == []
    assert kept.items() <= expected.items()
    assert len(kept) == (2 * (writes // 6) if writes % 6 < 5 else 2 * (writes // 6) + 1)
    build(tmp_path / "full", 50)
    assert shards(tmp_path / "full") == expected


def test_a_folder_cleared_during_a_build_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "whole", 50)
    move, moves = cache_store.os.replace, []

    def cleared(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 5:
            for folder in tmp_path.glob("cleared/representations/*/"):
                shutil.rmtree(folder)
        move(source, target)

    monkeypatch.setattr(cache_store.os, "replace", cleared)
    rows = build(tmp_path / "cleared", 50)
    assert shards(tmp_path / "cleared") == shards(tmp_path / "whole")
    assert len(rows["hog"](torch.arange(50))) == 50


def test_parts_that_vanish_again_and_again_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store.os, "replace", lambda source, target: Path(source).unlink())
    counting = Counting()
    with pytest.raises(RunError, match="removed by somebody else"):
        build(tmp_path, 20, nn.ModuleDict({"x": counting}))
    assert counting.images == 3 * 20


def test_a_part_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    store = cache_store.Store(tmp_path / "x", images=8, width=4, dtype=torch.float32, about={"name": "x"})
    dead = cache_store.part_of(store.path(1))
    store.prepare()
    dead.write_bytes(b"half")
    (tmp_path / "x" / "mine.part").write_bytes(b"precious")
    rows = torch.randn(8, 4)
    with cache_store.ShardWriter(store, 0) as writer:
        writer.write(rows)
        store.prepare()
        assert writer.part.exists()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["meta.json", "mine.part", "shard-00000"]
    assert store.missing(range(store.shards)) == []
    assert torch.equal(store.open()(torch.arange(8)), rows)
    raw = store.path(0).read_bytes()
    assert raw[:-32] == rows.numpy().astype("<f4").tobytes()
    assert raw[-32:] == hashlib.sha256(raw[:-32]).digest()
