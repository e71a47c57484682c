"""The folder of one cached representation: shards of rows with their checksums, written whole and read by index."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from mvmr.errors import RunError

try:
    import fcntl
except ImportError:  # Windows has none; there, a file in use cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

ROWS_PER_SHARD = 1024
"""Rows of a shard; the last one of a data set may have fewer."""
META = "meta.json"
OURS = re.compile(r"(meta\.json|shard-\d{5,})(\.[0-9a-f]{32}\.part)?")
"""The names of a cache folder's files."""

_DIGEST = 32
_BLOCK = 1 << 20
_READERS = 4
REMEDY = "make room, or set data.cache=DIR on another disk, a smaller cache.width, or cache=off"


class CachedRows:
    """One representation of every image of a data set, [N, F], looked up by the images' positions."""

    def __init__(self, shards: Sequence[Tensor], rows_per_shard: int):
        self._shards, self._rows_per_shard = list(shards), rows_per_shard
        # Rows of the mapped files are copied one by one: a numpy row costs a tenth of a tensor's.
        self._arrays = [shard.numpy() for shard in self._shards] if self._shards[0].device.type == "cpu" else []

    @property
    def width(self) -> int:
        """F"""
        return self._shards[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the rows are kept in; look-ups give float32."""
        return self._shards[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as they are kept."""
        return len(self) * self.width * self.dtype.itemsize

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    def __call__(self, index: Tensor) -> Tensor:
        """Rows at positions [B] int64, on the CPU: [B, F] float32. Raises IndexError outside 0 ... N - 1."""
        return self.rows(index, "cpu")

    def rows(self, index: Tensor, device: torch.device | str) -> Tensor:
        """The same on `device`; what travels there is the narrow type, without waiting for it."""
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            wrong = index[(index < 0) | (index >= len(self))][0]
            raise IndexError(f"image {int(wrong)} of a cache of {len(self)} images")
        if len(self._shards) == 1:
            data = self._shards[0]
            return data[index.to(data.device, non_blocking=True)].to(device, non_blocking=True).float()
        narrow = torch.empty(
            len(index), self.width, dtype=self.dtype, pin_memory=torch.device(device).type == "cuda"
        )  # [B, F]
        copies = narrow.numpy()
        for position, row in enumerate(index.tolist()):
            copies[position] = self._arrays[row // self._rows_per_shard][row % self._rows_per_shard]
        return narrow.to(device, non_blocking=True).float()

    def resident(self, device: torch.device | str) -> CachedRows:
        """The same rows in one tensor in the memory of `device`."""
        data = torch.empty(len(self), self.width, dtype=self.dtype, device=device)
        for shard, place in zip(self._shards, data.split(self._rows_per_shard), strict=True):
            place.copy_(shard)
        return CachedRows([data], len(self))


class Store:
    """What is kept of one representation in the folder of its key; `about` goes into the folder's meta.json."""

    def __init__(self, folder: Path, *, images: int, width: int, dtype: torch.dtype, about: dict[str, Any]):
        self.folder, self.images, self.width, self.dtype, self.about = folder, images, width, dtype, about
        self.rows_per_shard = ROWS_PER_SHARD
        self.shards = -(-images // self.rows_per_shard)

    def span(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the first one after it."""
        return shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.images)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}"

    def size(self, shard: int) -> int:
        """Bytes of its file: the rows and their SHA-256."""
        return self._row_bytes(shard) + _DIGEST

    def prepare(self) -> None:
        """Make the folder and its meta.json where they are missing; drop what killed processes left half written."""
        part = part_of(self.folder / META)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _drop_leftovers(self.folder)
            if not read_meta(self.folder):
                part.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
                os.replace(part, self.folder / META)
        except FileNotFoundError:  # cleared by another process at this moment; the shards are looked for again later
            pass
        except OSError as error:
            part.unlink(missing_ok=True)
            raise cannot_write(self.folder, error) from error

    def missing(self, shards: Iterable[int], *, warn: bool = True) -> list[int]:
        """Those of `shards` that are not there, or not as they were written; the latter are warned about."""
        shards = list(shards)
        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
            faults = dict(zip(shards, readers.map(self._fault, shards), strict=True))
        for shard, fault in faults.items():
            if fault and warn:
                warnings.warn(f"{self.path(shard)} {fault}: it is made again", stacklevel=2)
        return [shard for shard, fault in faults.items() if fault is not None]

    def absent(self) -> set[int]:
        """Shards without a file of the right size; a quick look, where `missing` reads everything."""
        return {shard for shard in range(self.shards) if size_of(self.path(shard)) != self.size(shard)}

    def open(self) -> CachedRows:
        """The rows of all shards, mapped: they are read from the files when they are looked up."""
        if not self.shards:
            return CachedRows([torch.empty(0, self.width, dtype=self.dtype)], self.rows_per_shard)
        return CachedRows([self._mapped(shard) for shard in range(self.shards)], self.rows_per_shard)

    def _mapped(self, shard: int) -> Tensor:
        first, stop = self.span(shard)
        # Private pages, and no file stays open: a large data set has more shards than a process may have files.
        values = torch.from_file(
            str(self.path(shard)), shared=False, size=(stop - first) * self.width, dtype=self.dtype
        )
        return values.view(stop - first, self.width)

    def _row_bytes(self, shard: int) -> int:
        first, stop = self.span(shard)
        return (stop - first) * self.width * self.dtype.itemsize

    def _fault(self, shard: int) -> str | None:
        """None for a whole shard, nothing for one that is not there, else what is wrong with it."""
        left = self._row_bytes(shard)
        try:
            with open(self.path(shard), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.size(shard):
                    return f"has {size} bytes instead of {self.size(shard)}"
                hashed = hashlib.sha256()
                while left and (block := file.read(min(left, _BLOCK))):
                    hashed.update(block)
                    left -= len(block)
                return None if not left and file.read() == hashed.digest() else "is damaged (wrong checksum)"
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"cannot be read ({error.strerror})"


class ShardWriter:
    """Writes one shard beside its place and moves it there when the block ends without an error.

    Entered by `with`; `write` takes the rows in order. Raises RunError where the disk is full or refuses.
    """

    def __init__(self, store: Store, shard: int):
        self.final = store.path(shard)
        self.part = part_of(self.final)
        self.is_in_place = False
        """Set at the end; stays False where another process has removed the folder meanwhile."""
        self._hashed = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.part, "xb")
        except OSError as error:
            raise cannot_write(self.part, error) from error
        hold(self._file)
        return self

    def write(self, rows: Tensor) -> None:
        """Append rows [b, F], on the CPU and of the store's type."""
        assert self._file is not None
        values = rows.contiguous().numpy().reshape(-1).view("uint8").data
        self._hashed.update(values)
        try:
            self._file.write(values)
        except OSError as error:
            raise cannot_write(self.part, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._move(self._file)
        except FileNotFoundError:
            pass
        except OSError as full:
            raise cannot_write(self.part, full) from full
        finally:
            with suppress(OSError):  # what a full disk has not taken is of no use any more
                self._file.close()
            self.part.unlink(missing_ok=True)

    def _move(self, file: IO[bytes]) -> None:
        file.write(self._hashed.digest())
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()  # Windows moves no open file; elsewhere it is held until it is in its place
        os.replace(self.part, self.final)
        self.is_in_place = True


def part_of(final: Path) -> Path:
    """A name beside `final` that no other process takes."""
    return final.with_name(f"{final.name}.{uuid.uuid4().hex}.part")


def hold(file: IO[Any]) -> bool:
    """Lock an open file until it is closed or the process ends; False if another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        return True
    return True


def size_of(path: Path) -> int:
    """Bytes of a file; of a link its own, and 0 of what is not there."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def read_meta(folder: Path) -> dict[str, Any]:
    """What is written about a cache folder; nothing where that is missing or damaged."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error that a full or refusing disk ends in."""
    return RunError(f"{path}: cannot be written ({error.strerror}); {REMEDY}. Finished parts are kept")


def _drop_leftovers(folder: Path) -> None:
    for part in folder.glob("*.part"):
        if OURS.fullmatch(part.name) and part.is_file():
            with suppress(OSError), open(part, "rb") as file:
                if hold(file):  # its writer lives no more
                    part.unlink()
