"""A file is there whole or as it was before, and a disk that does not take it is told."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from mvmr.errors import RunError
from mvmr.ops.files import write_whole


def test_what_is_written_is_moved_into_place(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.bin"

    def write(stream: BinaryIO) -> int:
        assert not file.exists()
        return stream.write(b"abc")

    assert write_whole(file, write, remedy="") == 3
    assert file.read_bytes() == b"abc"
    assert list(tmp_path.rglob("*")) == [file.parent, file]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"a\.bin: cannot be written \(No space left on device\); make room"),
        (RuntimeError("writing file failed"), r"a\.bin: cannot be written \(writing file failed\); make room"),
        (RunError("of its own"), "^of its own$"),
    ],
)
def test_a_full_disk_leaves_what_was_there(error: Exception, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")

    def fails(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise error

    with pytest.raises(RunError, match=message):
        write_whole(file, fails, remedy="make room")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    def killed(stream: BinaryIO) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.bin", killed, remedy="")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--out x: cannot be written \(.+\); name another"):
        write_whole(tmp_path / "file" / "a.bin", lambda stream: None, remedy="name another", name="--out x")
