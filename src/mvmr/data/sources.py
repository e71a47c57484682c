"""From the settings of a run to its images: which data set, which split, kept in memory, in an array or in files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from mvmr.data.datasets import DATASETS
from mvmr.data.files import check_files, kept_check, refuse_too_many, try_to_read, without_unreadable
from mvmr.data.images import ArraySource, FileSource, ImageSource, Progress, subset
from mvmr.data.layouts import Split, Wanted
from mvmr.data.store import prepare, prepare_exact
from mvmr.errors import UserError, nearest
from mvmr.ops.random import permutation
from mvmr.types import Section

__all__ = [
    "ArraySource",
    "DataConfig",
    "FileSource",
    "ImageSource",
    "Progress",
    "check_files",
    "open_source",
    "subset",
    "without_unreadable",
]

IN_MEMORY = 512 * 2**20
"""Bytes up to which files of one size are held in memory by `store: auto`."""
PEEK = 16
"""Files whose sizes are compared before all are read for that."""

Channels = tuple[float, float, float]


class DataConfig(Section):
    """The images: which data set, where it lies, how it is held and loaded."""

    name: str = "digits"
    """A key of DATASETS."""
    root: Path | None = None
    """The data set's folder, or its parent; digits needs none."""
    class_list: Path | None = None
    """Text file of the class ids of imagenet50, imagenet100 or imagenet200, one a line."""
    limit: int | None = Field(None, ge=1)
    """At most this many training images, chosen at random under the run's seed; the test split stays whole."""
    store: Literal["auto", "memory", "array", "files"] = "auto"
    """memory: one tensor; array: a memory-mapped array, made once in the cache; files: decoded when asked for.
    auto: memory for data sets of one image size and for files of one size up to 512 MB, else files."""
    store_size: int | None = Field(None, ge=1)
    """Side of the images that store=array or memory keeps of files; none: round(views.size x 256 / 224),
    the size that the plain view is cut from."""
    batch_size: int = Field(256, ge=1)
    """Images that the loss sees at each step, over all devices together."""
    workers: int = Field(0, ge=0)
    """Processes that decode files; 0: the main process does."""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Share of unreadable files above which a run stops before it trains; below, they are left out and listed."""
    download: bool = False
    """Fetch CIFAR or STL-10 into data.root if it is not there."""
    mean: Channels | None = None
    """Channel means of images in [0, 1]; none: the data set's own."""
    std: Channels | None = None
    """Channel deviations of images in [0, 1]; none: the data set's own."""
    cache: Path | None = None
    """Folder for lists of files, checks and arrays; none: $MVMR_CACHE or ~/.cache/mvmr."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"no data set {name!r}{nearest(name, DATASETS)}; known: {', '.join(DATASETS)}")
        return name

    @field_validator("std")
    @classmethod
    def _positive(cls, std: Channels | None) -> Channels | None:
        if std is not None and min(std) <= 0:
            raise ValueError("channel deviations must be above 0")
        return std


def open_source(
    config: DataConfig, split: Split, *, size: int, seed: int = 0, progress: Progress | None = None
) -> ImageSource:
    """The images of one split: pretrain, train or test. size: side of the views, on which `store` depends.

    Unreadable files are left out and listed in `.unreadable`. Raises UserError where the folder does not fit the data
    set, or more than `max_unreadable` of the files cannot be read; RunError where a disk or a download fails.
    """
    entry = DATASETS[config.name]
    source = entry.read(Wanted(
        config.name, split, config.root, entry.layout, class_list=config.class_list, download=config.download,
        fetchable=entry.fetchable, cache=config.cache, progress=progress,
    ))  # fmt: skip
    if config.limit is not None and split != "test" and config.limit < len(source):
        source = subset(source, permutation(seed, 0, len(source))[: config.limit].sort().values)
    if isinstance(source, FileSource):
        return _stored_files(source, config, size, progress)
    if config.store == "files":
        raise UserError(f"data.store=files: {config.name} is no data set of files; use data.store=auto")
    if config.store == "array":
        return prepare(source, size=config.store_size or entry.size or size, cache=config.cache, progress=progress)
    return source


def _stored_files(source: FileSource, config: DataConfig, size: int, progress: Progress | None) -> ImageSource:
    """Checked files, or an array of them; each file is decoded once for it, in this or an earlier run."""
    if config.store in ("array", "memory"):
        side = config.store_size or round(size * 256 / 224)
        array = prepare(source, size=side, cache=config.cache, progress=progress, workers=config.workers)
        refuse_too_many(array.unreadable, len(source), config.max_unreadable, name=source.name)
        return array if config.store == "array" else array.to("cpu")
    if config.store == "auto":
        same = _same_size(source, config, progress)
        if same is not None:
            refuse_too_many(same.unreadable, len(source), config.max_unreadable, name=source.name)
            return same.to("cpu")
    bad = check_files(source, workers=config.workers, cache_dir=config.cache, progress=progress)
    return without_unreadable(source, bad, config.max_unreadable)


def _same_size(source: FileSource, config: DataConfig, progress: Progress | None) -> ArraySource | None:
    """All images as they are, where they are squares of one size and few enough for the memory."""
    check = kept_check(source, cache_dir=config.cache)
    if check is not None:
        shapes = {tuple(shape) for shape in np.unique(check.sizes, axis=0).tolist() if shape != [0, 0]}
    else:
        first = (try_to_read(source, index) for index in range(min(PEEK, len(source))))
        shapes = {tuple(image.shape[1:]) for image in first if not isinstance(image, str)}
    height, width = shapes.pop() if len(shapes) == 1 else (0, 1)
    if height != width or len(source) * 3 * height * width > IN_MEMORY:
        return None
    return prepare_exact(source, size=height, cache=config.cache, progress=progress, workers=config.workers)
