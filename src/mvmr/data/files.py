"""Trees of image files: found once, checked once, and what is known about them kept in the cache folder."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mvmr.data.decode import EXTENSIONS, UnreadableImage
from mvmr.data.images import FileSource, ImageSource, PathList, Progress, Unreadable, digest, files_fingerprint
from mvmr.data.workers import in_workers
from mvmr.errors import UserError
from mvmr.ops.files import write_whole

try:
    import fcntl
except ImportError:  # Windows has none; there, two runs that start at once may do the same work twice
    fcntl = None  # type: ignore[assignment]

TRUSTED_FROM = 200_000
"""Files from which on a tree is not listed again while the times of its folders stay as they were."""
CHUNK = 64
"""Files that a worker checks at a time."""


@dataclass(frozen=True)
class Scan:
    """The image files under a folder."""

    root: str
    paths: PathList
    stats: np.ndarray
    """[N, 2] int64: size in bytes and time of change in nanoseconds."""

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(self.root, self.paths, self.stats)


def cache_folder(cache: Path | None, kind: str) -> Path:
    """The folder for one kind of kept data: under `cache`, else $MVMR_CACHE, else ~/.cache/mvmr; made if missing."""
    folder = (Path(cache or os.environ.get("MVMR_CACHE") or "~/.cache/mvmr") / kind).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set data.cache=DIR or MVMR_CACHE") from None
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path`.lock, so that of several processes one works and the others then find its result."""
    with open(f"{path}.lock", "w") as file:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems know no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def scan_tree(root: Path, *, cache: Path | None = None, progress: Progress | None = None) -> Scan:
    """All image files under `root`, known by their endings, in an order that depends on their names alone.

    Names that begin with a dot are passed over; links are followed. Trees of TRUSTED_FROM files or more are kept in
    the cache and listed again only when a folder's time of change shows that files came or went.
    """
    key = digest(os.fsencode(os.path.realpath(root)), " ".join(EXTENSIONS).encode())
    kept = cache_folder(cache, "scans") / key
    if scan := _kept_scan(kept, root):
        return scan
    scan, folders, times = _walk(str(root), progress)
    if len(scan.paths) >= TRUSTED_FROM:
        arrays = {
            "letters": scan.paths.letters, "offsets": scan.paths.offsets, "stats": scan.stats,
            "folder_letters": folders.letters, "folder_offsets": folders.offsets, "folder_times": times,
        }  # fmt: skip
        with locked(kept):
            part = fresh_part(kept)
            for name, values in arrays.items():
                np.save(part / f"{name}.npy", values)
            move_into_place(part, kept)
    return scan


def _kept_scan(kept: Path, root: Path) -> Scan | None:
    names = ("letters", "offsets", "stats", "folder_letters", "folder_offsets", "folder_times")
    try:
        arrays = [np.load(kept / f"{name}.npy", mmap_mode="r") for name in names]
        folders = PathList(arrays[3], arrays[4])
        for folder, time in zip(folders, arrays[5].tolist(), strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != time:
                return None
    except (OSError, ValueError):
        return None
    return Scan(str(root), PathList(arrays[0], arrays[1]), arrays[2])


def _walk(root: str, progress: Progress | None) -> tuple[Scan, PathList, np.ndarray]:
    letters, ends, stats = bytearray(), array("q", [0]), array("q")
    folders: list[str] = []
    times: list[int] = []
    waiting: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        full = os.path.join(os.fsencode(root), folder)
        try:
            stat = os.stat(full)
            entries = sorted(os.scandir(full), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data.root: {os.fsdecode(full)} cannot be listed ({error.strerror})") from None
        if (stat.st_dev, stat.st_ino) in above:  # a link to a folder that holds it
            continue
        folders.append(os.fsdecode(folder))
        times.append(stat.st_mtime_ns)
        below = [os.path.join(folder, e.name) for e in entries if e.is_dir() and not e.name.startswith(b".")]
        waiting.extend((name, above | {(stat.st_dev, stat.st_ino)}) for name in reversed(below))
        for entry in entries:
            if _is_image(entry):
                letters += os.path.join(folder, entry.name)
                ends.append(len(letters))
                stats.extend(_size_and_time(entry))
        if progress:
            progress("listing files", len(ends) - 1, 0)
    paths = PathList(np.frombuffer(bytes(letters), dtype=np.uint8), np.array(ends, dtype=np.int64))
    found = Scan(root, paths, np.array(stats, dtype=np.int64).reshape(-1, 2))
    return found, PathList.of(folders), np.array(times, dtype=np.int64)


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    known = os.path.splitext(entry.name)[1].lower() in _ENDINGS and not entry.name.startswith(b".")
    return known and (entry.is_file() or (entry.is_symlink() and not entry.is_dir()))


_ENDINGS = frozenset(ending.encode() for ending in EXTENSIONS)


def _size_and_time(entry: os.DirEntry[bytes]) -> tuple[int, int]:
    try:
        stat = entry.stat()
    except OSError:  # a link to nothing: found here, reported by check_files
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def fresh_part(final: Path) -> Path:
    """An empty folder beside `final` to work in; what a killed process left there is dropped. Call it when locked."""
    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


def move_into_place(part: Path, final: Path) -> None:
    """Rename a finished folder; what `final` was before is dropped."""
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)


@dataclass(frozen=True)
class Check:
    """What decoding every file once has shown."""

    sizes: np.ndarray
    """[N, 2] int32: height and width; zero for unreadable files."""
    bad: dict[int, str]
    """Reasons by position."""


def check_files(
    source: FileSource, *, workers: int = 0, cache_dir: Path | None = None, progress: Progress | None = None
) -> list[Unreadable]:
    """The files of `source` that cannot be decoded; see `examine`."""
    bad = examine(source, workers=workers, cache_dir=cache_dir, progress=progress).bad
    return [Unreadable(source.locate(index), reason) for index, reason in bad.items()]


def examine(
    source: FileSource, *, workers: int = 0, cache_dir: Path | None = None, progress: Progress | None = None
) -> Check:
    """Decode every file once, in `workers` processes (0: here); kept by the source's fingerprint.

    Files that were unreadable before are tried again, because permissions and disks recover.
    """
    kept = cache_folder(cache_dir, "checks") / f"{source.fingerprint}.npz"
    with locked(kept):
        check = kept_check(source, cache_dir=cache_dir)
        if check is not None:
            return check
        check = _examine(source, workers=workers, progress=progress)
        bad = np.frombuffer(json.dumps(list(check.bad.items())).encode(), dtype=np.uint8)
        write_whole(
            kept, lambda file: np.savez_compressed(file, sizes=check.sizes, bad=bad),
            remedy="make room on the disk, or set MVMR_CACHE to a folder on another one",
        )  # fmt: skip
        return check


def kept_check(source: FileSource, *, cache_dir: Path | None) -> Check | None:
    """What an earlier `examine` has found, unless files have become readable since."""
    try:
        with np.load(cache_folder(cache_dir, "checks") / f"{source.fingerprint}.npz") as arrays:
            sizes, bad = arrays["sizes"], dict(json.loads(arrays["bad"].tobytes()))
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return Check(sizes, bad) if len(sizes) == len(source) and still_unreadable(source, bad) else None


def still_unreadable(source: ImageSource, positions: Sequence[int] | dict[int, str]) -> bool:
    """Whether none of these files can be read."""
    return not any(isinstance(try_to_read(source, index), torch.Tensor) for index in positions)


def try_to_read(source: ImageSource, index: int) -> torch.Tensor | str:
    """The image, or the reason why there is none."""
    try:
        return source.read(index)
    except UnreadableImage as error:
        return error.reason


def _examine(source: FileSource, *, workers: int, progress: Progress | None) -> Check:
    chunks = [(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    sizes = np.zeros((len(source), 2), dtype=np.int32)
    bad: dict[int, str] = {}
    for (start, stop), found in zip(chunks, in_workers(partial(_sizes, source), chunks, workers=workers), strict=True):
        for index, size in enumerate(found, start):
            if isinstance(size, str):
                bad[index] = size
            else:
                sizes[index] = size
        if progress:
            progress("checking files", stop, len(source))
    return Check(sizes, bad)


def _sizes(source: FileSource, chunk: tuple[int, int]) -> list[tuple[int, int] | str]:
    images = (try_to_read(source, index) for index in range(*chunk))
    return [image if isinstance(image, str) else (image.shape[1], image.shape[2]) for image in images]


def without_unreadable(source: FileSource, bad: Sequence[Unreadable], max_unreadable: float) -> FileSource:
    """The source without its unreadable files; they are listed in `.unreadable`.

    Raises UserError when their share is above `max_unreadable`, or when nothing is left.
    """
    refuse_too_many(bad, len(source), max_unreadable, name=source.name)
    if not bad:
        return source
    names = {entry.path for entry in bad}
    kept = source.take(torch.tensor([i for i in range(len(source)) if source.locate(i) not in names]))
    kept.unreadable = list(bad)
    return kept


def refuse_too_many(bad: Sequence[Unreadable], files: int, max_unreadable: float, *, name: str) -> None:
    """Raise UserError when more than this share of the files is unreadable, or all of them are."""
    if not bad or (len(bad) <= max_unreadable * files and len(bad) < files):
        return
    listed = "".join(f"\n  {entry.path}: {entry.reason}" for entry in bad[:5])
    more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    share = -(-1000 * len(bad) // files) / 1000  # rounded up, so that the value named here is enough
    remedy = (
        "none can be read: is data.root the right folder?" if len(bad) == files else
        f"repair or remove them, or leave them out with data.max_unreadable={share:g}"
    )  # fmt: skip
    raise UserError(
        f"data.max_unreadable: {len(bad)} of the {files} files of {name} cannot be read "
        f"({100 * len(bad) / files:.2f} %, {100 * max_unreadable:g} % are accepted); {remedy}{listed}{more}"
    )


def write_unreadable(path: Path, bad: Sequence[Unreadable]) -> None:
    """One line a file: path, tab, reason; empty when every file was read."""
    lines = ["\t".join(part.replace("\t", " ").replace("\n", " ") for part in (e.path, e.reason)) for e in bad]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogateescape")
