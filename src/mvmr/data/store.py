"""Images of one size in one memory-mapped array, made once and kept in the cache folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mvmr.data.files import cache_folder, fresh_part, locked, move_into_place, still_unreadable, try_to_read
from mvmr.data.images import ArraySource, FileSource, ImageSource, Progress, Unreadable, digest, subset
from mvmr.data.view_ops import resize
from mvmr.data.workers import in_workers
from mvmr.errors import RunError

CHUNK = 32
"""Images that a worker prepares at a time."""
LONGEST = 4
"""Longest side over shortest, beyond which an image is cut before it is resized, to bound the memory it needs."""


def resize_and_crop(image: Tensor, size: int) -> Tensor:
    """The centre of [..., 3, H, W] uint8 as [..., 3, size, size]: shorter side resized to `size`, then cut.

    Bilinear, antialiased, as `view_ops.plain` does it; an image of exactly this size comes back as it is.
    """
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    short = min(height, width)
    image = centre(image, min(height, LONGEST * short), min(width, LONGEST * short))
    height, width = image.shape[-2:]
    image = resize(image, (int(height * size / short), int(width * size / short)))
    return centre(image, size, size).contiguous()


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """The central [..., height, width] of a larger image."""
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]


def prepare(
    source: ImageSource, *, size: int, cache: Path | None = None, progress: Progress | None = None, workers: int = 0
) -> ArraySource:
    """All images of `source` as a memory-mapped array [N, 3, size, size], resized and cut by `resize_and_crop`.

    Made once in `cache` and keyed by the source's fingerprint and the size; written beside and moved into place.
    Files that cannot be read are left out and listed in `.unreadable`. Raises RunError when the disk is too small.
    """
    array = _prepared(source, size=size, cache=cache, progress=progress, workers=workers, exact=False)
    assert array is not None
    return array


def prepare_exact(
    source: ImageSource, *, size: int, cache: Path | None = None, progress: Progress | None = None, workers: int = 0
) -> ArraySource | None:
    """As `prepare` where every image is size x size already; None as soon as one is not."""
    return _prepared(source, size=size, cache=cache, progress=progress, workers=workers, exact=True)


def _prepared(
    source: ImageSource, *, size: int, cache: Path | None, progress: Progress | None, workers: int, exact: bool
) -> ArraySource | None:
    key = digest(source.fingerprint.encode(), f"{size} exact={exact}".encode())
    final = cache_folder(cache, "arrays") / key
    with locked(final):
        bad = _kept(final, source, size)
        if bad is None:
            _need_room(final.parent, len(source), size)
            part = fresh_part(final)
            try:
                bad = _write(part, source, size, exact=exact, workers=workers, progress=progress)
                if bad is None:
                    return None
                move_into_place(part, final)
            except OSError as error:
                remedy = "make room, or set data.cache=DIR on another disk"
                raise RunError(f"{part}: cannot be written ({error.strerror}); {remedy}") from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
    if bad:
        source = subset(source, torch.tensor([index for index in range(len(source)) if index not in bad]))
    fingerprint = digest(source.fingerprint.encode(), str(size).encode())
    array = ArraySource.mapped(final / "images.bin", size, source, fingerprint=fingerprint)
    array.unreadable = [*source.unreadable, *(Unreadable(path, reason) for path, reason in bad.values())]
    return array


def _kept(final: Path, source: ImageSource, size: int) -> dict[int, tuple[str, str]] | None:
    """{position: (path, reason)} of the files left out of a finished array; None if it has to be made (again)."""
    try:
        bad = {index: (path, reason) for index, path, reason in json.loads((final / "unreadable.json").read_text())}
        complete = (final / "images.bin").stat().st_size == (len(source) - len(bad)) * 3 * size * size
    except (OSError, ValueError):
        return None
    tried = not isinstance(source, FileSource) or still_unreadable(source, list(bad))
    return bad if complete and tried else None


def _write(
    part: Path, source: ImageSource, size: int, *, exact: bool, workers: int, progress: Progress | None
) -> dict[int, tuple[str, str]] | None:
    """Fill the folder `part`; returns what was unreadable, or None when an image has another size and `exact` is on."""
    bad: dict[int, tuple[str, str]] = {}
    with open(part / "images.bin", "wb") as file:
        for stop, images, unreadable in _made(source, size, exact=exact, workers=workers):
            if images is None:
                return None
            file.write(images.numpy().data)
            bad.update(unreadable)
            if progress:
                progress("preparing images", stop, len(source))
        file.flush()
        os.fsync(file.fileno())
    (part / "unreadable.json").write_text(json.dumps([[index, *entry] for index, entry in bad.items()]))
    return bad


Prepared = tuple[int, Tensor | None, dict[int, tuple[str, str]]]


def _made(source: ImageSource, size: int, *, exact: bool, workers: int) -> Iterator[Prepared]:
    chunks = [(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    return in_workers(partial(_chunk, source, size, exact), chunks, workers=workers)


def _chunk(source: ImageSource, size: int, exact: bool, chunk: tuple[int, int]) -> Prepared:
    start, stop = chunk
    images: list[Tensor] = []
    bad: dict[int, tuple[str, str]] = {}
    for index in range(start, stop):
        image = try_to_read(source, index)
        if isinstance(image, str):
            bad[index] = (source.locate(index) if isinstance(source, FileSource) else str(index), image)
        elif exact and image.shape[1:] != (size, size):
            return stop, None, bad
        else:
            images.append(resize_and_crop(image, size))
    return stop, torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8), bad


def _need_room(folder: Path, images: int, size: int) -> None:
    need, free = images * 3 * size * size, shutil.disk_usage(folder).free
    if need > free:
        raise RunError(
            f"{folder}: the array of {images} images of {size} x {size} needs {need / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; "
            "set data.cache=DIR on a larger disk, a smaller data.store_size, or data.store=files"
        )
