"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from mvmr.errors import RunError

Written = TypeVar("Written")


def write_whole(file: Path, write: Callable[[BinaryIO], Written], *, remedy: str, name: str | None = None) -> Written:
    """write(stream) into a hidden file beside `file`, brought to the disk and moved into its place.

    Folders are made. Whatever happens meanwhile, `file` is as before or new, and nothing else is left. remedy: the end
    of the message of the RunError that is raised where the disk does not take it; name: its beginning, else the file.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            written = write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    except RunError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter for a full disk
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise RunError(f"{name or file}: cannot be written ({reason}); {remedy}") from None
    finally:
        with suppress(OSError):  # a folder of that name may be a file
            beside.unlink()
    return written


def write_bytes(file: Path, content: bytes, *, remedy: str, name: str | None = None) -> None:
    """`content` as a file, as `write_whole` does it."""
    write_whole(file, lambda stream: stream.write(content), remedy=remedy, name=name)
