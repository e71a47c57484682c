"""What lies in the cache folder, and how it is removed."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mvmr.data.files import cache_folder
from mvmr.errors import UserError
from mvmr.representations.cache_store import OURS, Store, hold, read_meta, size_of

KIND = "representations"
"""The folder of these caches within the cache folder."""
OTHER_KINDS = ("arrays", "checks", "scans")
"""Folders of what else is kept there; see `mvmr.data`."""

_KEY = re.compile(r"[0-9a-f]{32}")
_OTHER = re.compile(r"[0-9a-f]{32}(\.npz)?(\.part)?")


@dataclass(frozen=True)
class CacheEntry:
    """One cached representation of one data set."""

    key: str
    kind: str
    """Class of the representation; "?" where the entry's description is damaged."""
    name: str
    """What the run that made it called it."""
    data: str
    images: int
    width: int
    projected_from: int | None
    """Features before the projection; None where rows are exact."""
    dtype: str
    bytes: int
    complete: bool
    """Whether every shard is there with its right size; checksums are verified when a run opens it."""
    created: str
    """Date and time, UTC."""


def entries(folder: Path | None) -> list[CacheEntry]:
    """The cached representations in `folder` (data.cache), by their kinds and data sets."""
    found = [_entry(path) for path in _folders(folder)]
    return sorted(found, key=lambda entry: (entry.kind, entry.data, entry.created, entry.key))


def clear(folder: Path | None, keys: Sequence[str] | None = None) -> int:
    """Remove the cached representations with these keys, or all; returns the bytes freed.

    Only the cache's own files go, and links are not followed. What another process is building is left, with a warning.
    Raises UserError for a key that is not there.
    """
    known = {path.name: path for path in _folders(folder)}
    for key in keys or ():
        if key not in known:
            raise UserError(f"{cache_folder(folder, KIND)}: no cached representation has the key {key}")
    freed = 0
    for key in known if keys is None else dict.fromkeys(keys):
        with _unless_in_use(known[key]) as free_to_go:
            freed += _remove_entry(known[key]) if free_to_go else 0
    return freed


def other_kinds(folder: Path | None) -> dict[str, int]:
    """{kind: bytes} of what else is kept in `folder`: prepared arrays, checks of files, scans of trees."""
    return {kind: sum(map(_bytes, _others(folder, kind))) for kind in OTHER_KINDS}


def clear_others(folder: Path | None) -> int:
    """Remove what `other_kinds` counts; returns the bytes freed. As `clear`, it leaves what is in use."""
    freed = 0
    for path in (path for kind in OTHER_KINDS for path in _others(folder, kind)):
        with _unless_in_use(path.with_name(path.name.removesuffix(".part"))) as free_to_go:
            if free_to_go:
                size = _bytes(path)
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                freed += size - (_bytes(path) if path.exists() else 0)
    return freed


def _folders(folder: Path | None) -> list[Path]:
    found = cache_folder(folder, KIND).iterdir()
    return sorted(path for path in found if _KEY.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def _others(folder: Path | None, kind: str) -> list[Path]:
    within = cache_folder(folder, KIND).parent / kind
    if within.is_symlink() or not within.is_dir():
        return []
    return sorted(path for path in within.iterdir() if _OTHER.fullmatch(path.name) and not path.is_symlink())


def _entry(path: Path) -> CacheEntry:
    meta = read_meta(path)
    try:
        images, width, dtype = int(meta["images"]), int(meta["width"]), str(meta["dtype"])
        store = Store(path, images=images, width=width, dtype=getattr(torch, dtype), about=meta)
        store.rows_per_shard = rows = int(meta["rows_per_shard"])
        store.shards = -(-images // rows)
        complete = not store.absent()
    except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError):
        return CacheEntry(path.name, "?", "?", "?", 0, 0, None, "?", _bytes(path), False, "?")
    return CacheEntry(
        key=path.name, kind=str(meta.get("kind", "?")), name=str(meta.get("name", "?")),
        data=str(meta.get("data", "?")), images=images, width=width, projected_from=meta.get("projected_from"),
        dtype=dtype, bytes=_bytes(path), complete=complete, created=str(meta.get("created", "?")),
    )  # fmt: skip


def _remove_entry(path: Path) -> int:
    freed = 0
    for file in path.iterdir():
        if OURS.fullmatch(file.name) and (file.is_file() or file.is_symlink()):
            freed += size_of(file)
            file.unlink(missing_ok=True)
    try:
        path.rmdir()
    except OSError:
        warnings.warn(f"{path} holds files that are not the cache's: they are left", stacklevel=3)
    return freed


@contextmanager
def _unless_in_use(path: Path) -> Iterator[bool]:
    """Holds the lock of `path` and gives True, or gives False because another process holds it."""
    with open(f"{path}.lock", "w") as file:
        free_to_go = hold(file)
        if not free_to_go:
            warnings.warn(f"{path} is being made by another process: it is left", stacklevel=4)
        yield free_to_go
        if free_to_go and not path.exists():
            with suppress(OSError):
                Path(file.name).unlink()


def _bytes(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return size_of(path)
    return sum(size_of(file) for file in path.rglob("*") if not file.is_dir())
