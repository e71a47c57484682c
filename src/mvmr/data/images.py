"""Images by index: held in memory, in a memory-mapped array, or in files."""

from __future__ import annotations

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from mvmr.data.decode import decode

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): called now and then while something long is under way."""


@dataclass(frozen=True)
class Unreadable:
    """A file that was left out, and why."""

    path: str
    reason: str


class PathList(Sequence[str]):
    """Relative paths as one block of bytes and N + 1 offsets: millions cost what their letters cost."""

    def __init__(self, letters: np.ndarray, offsets: np.ndarray):
        self.letters = letters
        """[L] uint8, all paths one after another."""
        self.offsets = offsets
        """[N + 1] int64."""

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathList:
        """The same paths, packed."""
        encoded = [os.fsencode(path) for path in paths]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(path) for path in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> str | PathList:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self.letters[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def take(self, indices: np.ndarray) -> PathList:
        """The paths at some positions."""
        lengths = np.diff(self.offsets)[indices]
        offsets = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        where = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return PathList(self.letters[where], offsets)


class ImageSource(ABC):
    """uint8 images by index, with optional labels."""

    def __init__(
        self,
        labels: Tensor | None,
        *,
        name: str,
        classes: tuple[str, ...],
        paths: Sequence[str] | None,
        fingerprint: str | None,
    ):
        self.labels = labels
        """[N] int64, one class an image; or [N, C] int8, several: 1 present, 0 absent, -1 left out; or None."""
        self.name = name
        """Data set and split, as in cifar10/train."""
        self.classes = classes
        self.paths = paths
        """File names, relative to the data set's folder; None where images have none."""
        self.unreadable: list[Unreadable] = []
        """Files that were left out."""
        self._fingerprint = fingerprint
        if labels is not None and len(labels) != len(self):
            raise ValueError(f"{name}: {len(self)} images and {len(labels)} labels")
        if labels is not None and (labels.ndim > 2 or (labels.ndim == 2 and labels.shape[1] != len(classes))):
            raise ValueError(f"{name}: labels must be [N], or [N, C] for C = {len(classes)}, not {list(labels.shape)}")

    @property
    def fingerprint(self) -> str:
        """A hash of what the source holds; the key of everything that is kept about it."""
        if self._fingerprint is None:
            self._fingerprint = self._hashed()
        return self._fingerprint

    @abstractmethod
    def _hashed(self) -> str: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Image `index`: [3, H, W] uint8. Raises UnreadableImage."""

    @abstractmethod
    def take(self, indices: Tensor) -> ImageSource:
        """The images at positions `indices` [n], in that order, as a source of the same kind."""


class ArraySource(ImageSource):
    """Images of one size in one tensor [N, 3, H, W], which may lie in memory, on a device, or in a mapped file."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        name: str,
        classes: tuple[str, ...] = (),
        paths: Sequence[str] | None = None,
        fingerprint: str | None = None,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{name}: images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
        self._stored = images
        self._rows: Tensor | None = None
        self._file: str | None = None
        super().__init__(labels, name=name, classes=classes, paths=paths, fingerprint=fingerprint)

    @classmethod
    def mapped(cls, file: Path, size: int, like: ImageSource, *, fingerprint: str) -> ArraySource:
        """The raw bytes of [N, 3, size, size] in `file`, with the labels and names of `like`."""
        source = cls(
            _map(str(file), (3, size, size)),
            like.labels, name=like.name, classes=like.classes, paths=like.paths, fingerprint=fingerprint,
        )  # fmt: skip
        source._file = str(file)
        return source

    @property
    def is_mapped(self) -> bool:
        """Whether the images lie in a file, so that reading them may wait for a disk."""
        return self._file is not None

    @property
    def images(self) -> Tensor:
        """[N, 3, H, W] uint8."""
        return self._stored if self._rows is None else self._stored[self._rows]

    def _hashed(self) -> str:
        images = self.images.cpu().contiguous()
        return digest(str(tuple(images.shape)).encode(), images.numpy().reshape(-1).data)

    def __len__(self) -> int:
        return len(self._stored) if self._rows is None else len(self._rows)

    def read(self, index: int) -> Tensor:
        return self._stored[index if self._rows is None else int(self._rows[index])]

    def gather(self, index: Tensor) -> Tensor:
        """Images [B, 3, H, W] at positions [B], on the device of the array."""
        rows = index if self._rows is None else self._rows[index]
        return self._stored[rows.to(self._stored.device)]

    def to(self, device: torch.device | str) -> ArraySource:
        """The same source with a copy of its images in the memory of `device`."""
        moved = ArraySource(
            self.images.to(device, copy=True), self.labels, name=self.name, classes=self.classes, paths=self.paths,
            fingerprint=self._fingerprint,
        )  # fmt: skip
        moved.unreadable = self.unreadable
        return moved

    def take(self, indices: Tensor) -> ArraySource:
        kept = copy.copy(self)
        kept._fingerprint = digest(self.fingerprint.encode(), indices.numpy().tobytes())
        kept.labels = None if self.labels is None else self.labels[indices]
        kept.paths = _paths_at(self.paths, indices)
        if self.is_mapped:  # a part of a mapped file stays mapped
            kept._rows = indices if self._rows is None else self._rows[indices]
        else:
            kept._stored = self.gather(indices)
        return kept

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the file themselves: a mapped array may be larger than memory.
        state = self.__dict__.copy()
        if self._file:
            state["_stored"] = tuple(self._stored.shape[1:])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file:
            self._stored = _map(self._file, state["_stored"])


class FileSource(ImageSource):
    """Images in files under one folder, decoded when they are read."""

    def __init__(
        self,
        root: Path | str,
        paths: Sequence[str],
        labels: Tensor | None,
        *,
        name: str,
        classes: tuple[str, ...] = (),
        fingerprint: str | None = None,
    ):
        self.root = str(root)
        self._paths = paths if isinstance(paths, PathList) else PathList.of(paths)
        super().__init__(labels, name=name, classes=classes, paths=self._paths, fingerprint=fingerprint)

    def _hashed(self) -> str:
        stats = [os.stat(self.locate(index)) for index in range(len(self))]
        return files_fingerprint(
            self.root, self._paths, np.array([[s.st_size, s.st_mtime_ns] for s in stats], dtype=np.int64)
        )

    def __len__(self) -> int:
        return len(self._paths)

    def locate(self, index: int) -> str:
        """Full path of image `index`."""
        return os.path.join(self.root, self._paths[index])

    def read(self, index: int) -> Tensor:
        return decode(self.locate(index))

    def take(self, indices: Tensor) -> FileSource:
        kept = FileSource(
            self.root,
            self._paths.take(indices.numpy()),
            None if self.labels is None else self.labels[indices],
            name=self.name,
            classes=self.classes,
            fingerprint=digest(self.fingerprint.encode(), indices.numpy().tobytes()),
        )
        kept.unreadable = self.unreadable
        return kept


def subset(source: ImageSource, indices: Tensor) -> ImageSource:
    """The images at positions `indices` [n] int64, in that order, as a source of the same kind."""
    return source.take(indices.to(dtype=torch.int64, device="cpu").contiguous())


def digest(*parts: bytes | memoryview) -> str:
    """32 hexadecimal digits that differ whenever the parts do."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:32]


def files_fingerprint(root: str, paths: PathList, stats: np.ndarray) -> str:
    """Of the folder, the paths, and each file's size and time of change (`stats` [N, 2] int64)."""
    letters, offsets = paths.letters.tobytes(), paths.offsets.tobytes()
    return digest(os.fsencode(os.path.realpath(root)), letters, offsets, np.ascontiguousarray(stats).tobytes())


def _paths_at(paths: Sequence[str] | None, indices: Tensor) -> Sequence[str] | None:
    if isinstance(paths, PathList):
        return paths.take(indices.numpy())
    return None if paths is None else [paths[index] for index in indices.tolist()]


def _map(file: str, shape: tuple[int, ...]) -> Tensor:
    if os.path.getsize(file) == 0:
        return torch.empty(0, *shape, dtype=torch.uint8)
    # Copy-on-write: torch wants a writable array, and the file must never change.
    return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c").reshape(-1, *shape))
