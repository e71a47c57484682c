"""The memory-mapped array: what it holds, that it is made once, and that a killed or full machine breaks nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.data import store
from mvmr.data.images import ArraySource, FileSource, subset
from mvmr.data.store import prepare, prepare_exact, resize_and_crop
from mvmr.data.view_ops import plain
from mvmr.errors import RunError


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    """70 images (more than two chunks) of several shapes; number 5 is broken."""
    generator = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    names = []
    for number in range(70):
        pixels = generator.integers(0, 256, (20 + number % 7, 24, 3), dtype=np.uint8)
        names.append(f"{number:02d}.bmp")
        Image.fromarray(pixels).save(tmp_path / "own" / names[-1])
    (tmp_path / "own" / "05.bmp").write_bytes(b"BM")
    return FileSource(tmp_path / "own", names, torch.arange(70) % 3, name="own/train", classes=("a", "b", "c"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_array_holds_every_readable_image(source: FileSource, tmp_path: Path, workers: int) -> None:
    told: list[tuple[str, int, int]] = []
    array = prepare(
        source, size=16, cache=tmp_path / "cache", workers=workers, progress=lambda *told_now: told.append(told_now)
    )
    kept = [number for number in range(70) if number != 5]
    assert array.images.shape == (69, 3, 16, 16)
    for row, number in enumerate(kept):
        assert (array.read(row) == resize_and_crop(source.read(number), 16)).all()
    assert array.labels is not None
    assert array.labels.tolist() == [number % 3 for number in kept]
    assert array.paths is not None
    assert array.paths[5] == "06.bmp"
    assert [entry.path for entry in array.unreadable] == [source.locate(5)]
    assert told[-1] == ("preparing images", 70, 70)


def test_it_is_made_once_and_keyed_by_content_and_size(source: FileSource, tmp_path: Path) -> None:
    first = prepare(source, size=16, cache=tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/arrays/*/images.bin")}
    again = prepare(source, size=16, cache=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/arrays/*/images.bin")} == times
    assert (again.images == first.images).all()
    assert again.fingerprint == first.fingerprint
    other = prepare(source, size=8, cache=tmp_path / "cache")
    assert other.fingerprint != first.fingerprint
    assert len(list(tmp_path.glob("cache/arrays/*/images.bin"))) == 2


def test_a_repaired_file_comes_back(source: FileSource, tmp_path: Path) -> None:
    assert len(prepare(source, size=16, cache=tmp_path / "cache")) == 69
    Image.new("RGB", (20, 20)).save(source.locate(5))
    assert len(prepare(source, size=16, cache=tmp_path / "cache")) == 70


def test_images_of_the_right_size_are_stored_exactly(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (40, 3, 9, 9), dtype=torch.uint8)
    array = prepare_exact(ArraySource(images, None, name="own"), size=9, cache=tmp_path)
    assert array is not None
    assert (array.images == images).all()
    assert prepare_exact(ArraySource(images, None, name="own"), size=8, cache=tmp_path) is None
    assert len(list(tmp_path.glob("arrays/*.part"))) == 0


def test_resize_and_crop_agrees_with_the_plain_view() -> None:
    # The array keeps what the plain view is cut from: both ways lead to the same pixels.
    for height, width in ((61, 80), (300, 77), (32, 32), (100, 341)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        kept = resize_and_crop(image, 28 * 256 // 224)
        assert torch.equal(plain(kept, 28), plain(image, 28))
    strip = torch.randint(0, 256, (3, 2, 50_000), dtype=torch.uint8)
    assert resize_and_crop(strip, 256).shape == (3, 256, 256)


KILLED = """
import os, signal, sys, torch
from mvmr.data import store
from mvmr.data.images import FileSource

done = 0
def dies(*arguments):
    global done
    done += 1
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk(*arguments)

chunk, store._chunk = store._chunk, dies
source = FileSource(sys.argv[1], sorted(os.listdir(sys.argv[1])), None, name="own")
store.prepare(source, size=16, cache=sys.argv[2])
"""


def test_a_killed_run_leaves_no_array(source: FileSource, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, source.root, str(tmp_path / "cache")], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = [path for path in (tmp_path / "cache" / "arrays").iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".part"]  # half an array, under a name that nothing reads
    array = prepare(source, size=16, cache=tmp_path / "cache")
    assert len(array) == 69
    assert (array.read(68) == resize_and_crop(source.read(69), 16)).all()
    assert not list((tmp_path / "cache" / "arrays").glob("*.part"))


def test_a_short_array_is_made_again(source: FileSource, tmp_path: Path) -> None:
    prepare(source, size=16, cache=tmp_path / "cache")
    (stored,) = tmp_path.glob("cache/arrays/*/images.bin")
    os.truncate(stored, 1000)
    assert len(prepare(source, size=16, cache=tmp_path / "cache").images) == 69


def test_a_full_disk_is_named_before_and_while_writing(
    source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(RunError, match=r"data\.cache=DIR"):
        prepare(source, size=16, cache=tmp_path / "cache")
    monkeypatch.undo()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        prepare(source, size=16, cache=tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "arrays").iterdir() if path.is_dir()] == []


def test_a_mapped_array_travels_as_its_name(source: FileSource, tmp_path: Path) -> None:
    array = prepare(source, size=64, cache=tmp_path)
    packed = pickle.dumps(array)
    assert len(packed) < 20_000 < array.images.numel()
    assert (pickle.loads(packed).images == array.images).all()
    part = subset(array, torch.tensor([60, 2]))
    assert isinstance(part, ArraySource)
    assert part.is_mapped
    assert part.labels is not None
    assert len(part) == len(part.labels) == 2
    again = pickle.loads(pickle.dumps(subset(part, torch.tensor([1]))))
    assert (again.read(0) == array.read(2)).all()
    array.images[0] = 0  # a private copy: the file stays as it is
    assert prepare(source, size=64, cache=tmp_path).read(0).any()
