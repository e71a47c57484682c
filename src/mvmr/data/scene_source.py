"""Images with the objects in them: boxes, classes and masks by index."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvmr.data.decode import UnreadableImage, decode
from mvmr.types import UserError


@dataclass(frozen=True)
class Scene:
    """One image and its n objects."""

    image: Tensor
    """[3, H, W] uint8."""
    boxes: Tensor
    """[n, 4] float32: left, top, right, bottom in pixels, of which the image's corners are 0, 0, W and H."""
    labels: Tensor
    """[n] int64, numbers of the source's classes."""
    masks: Tensor | None
    """[n, H, W] bool, or None where they were not asked for."""
    ignored: Tensor
    """[n] bool: VOC's difficult objects and COCO's crowds, which count neither as found nor as missed."""
    name: str
    """File, relative to the source's folder."""


@dataclass(frozen=True)
class Objects:
    """What is known of one image before it is decoded."""

    file: str
    """Relative to the source's folder."""
    boxes: np.ndarray
    """[n, 4] float32, as in Scene."""
    labels: np.ndarray
    """[n] int64."""
    ignored: np.ndarray
    """[n] bool."""
    size: tuple[int, int] | None = None
    """Height and width that the annotation says."""
    outlines: Sequence[Any] = field(default=(), repr=False)
    """What the masks are drawn from, one an object, or nothing."""


class SceneSource:
    """Scenes by index, decoded when they are asked for."""

    def __init__(
        self,
        root: Path,
        objects: Sequence[Objects],
        *,
        name: str,
        classes: tuple[str, ...],
        draw: Callable[[Any, int, int], np.ndarray] | None = None,
    ):
        """draw: from an outline, height and width to a mask [H, W] bool; None gives scenes without masks."""
        self.root = root
        self.objects = objects
        self.name = name
        """Data set and split, as in voc07/train."""
        self.classes = classes
        self._draw = draw
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Scene:
        """Raises UserError for a file that cannot be read or is not of the size that its annotation says."""
        known = self.objects[index]
        path = self.root / known.file
        try:
            image = decode(path)
        except UnreadableImage as error:
            raise UserError(f"data.root: {error}; repair the file, or take its image off the list") from None
        height, width = image.shape[1:]
        if known.size is not None and known.size != (height, width):
            raise UserError(
                f"data.root: {path} is {width} x {height}, its annotation says {known.size[1]} x {known.size[0]}: "
                "boxes would not fit; take image and annotation from one archive"
            )
        return Scene(
            image, torch.from_numpy(known.boxes), torch.from_numpy(known.labels), self._masks(known, height, width),
            torch.from_numpy(known.ignored), known.file,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """A hash of the objects, and of the names and sizes of the files; the same wherever they lie."""
        if self._fingerprint is None:
            hasher = hashlib.sha256(repr((self.name, self.classes, self._draw is not None)).encode())
            for known in self.objects:
                try:
                    size = os.path.getsize(self.root / known.file)
                except OSError:  # told by name when it is read
                    size = -1
                hasher.update(f"{known.file}\n{size} {known.size} {len(known.labels)}\n".encode())
                for array in (known.boxes, known.labels, known.ignored):
                    hasher.update(np.ascontiguousarray(array).tobytes())
                for outline in known.outlines if self._draw is not None else ():
                    hasher.update(_as_bytes(outline))
            self._fingerprint = hasher.hexdigest()[:32]
        return self._fingerprint

    def take(self, indices: Sequence[int]) -> SceneSource:
        """The scenes at some positions, in that order."""
        return SceneSource(
            self.root, [self.objects[i] for i in indices], name=self.name, classes=self.classes, draw=self._draw
        )

    def as_one_class(self) -> SceneSource:
        """The same scenes with every object of the one class `object`."""
        objects = [replace(known, labels=np.zeros_like(known.labels)) for known in self.objects]
        return SceneSource(self.root, objects, name=self.name, classes=("object",), draw=self._draw)

    def _masks(self, known: Objects, height: int, width: int) -> Tensor | None:
        if self._draw is None:
            return None
        masks = np.zeros((len(known.labels), height, width), dtype=bool)
        for mask, outline in zip(masks, known.outlines, strict=True):
            try:
                mask[:] = self._draw(outline, height, width)
            except UserError as error:
                raise UserError(f"data.root: {self.root / known.file}: {error}") from None
        return torch.from_numpy(masks)


def _as_bytes(outline: Any) -> bytes:
    if isinstance(outline, np.ndarray):
        return f"{outline.dtype}{outline.shape}".encode() + outline.tobytes()
    if isinstance(outline, tuple):
        return b"(" + b"".join(map(_as_bytes, outline)) + b")"
    return repr(outline).encode()
