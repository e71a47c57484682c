"""What representations make of every image, computed once and looked up by index (architecture, decision 4)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvmr.data.files import cache_folder, locked
from mvmr.data.images import ArraySource, ImageSource, Progress, digest, subset
from mvmr.data.loading import plain_batches
from mvmr.data.view_ops import as_float, normalise
from mvmr.errors import RunError
from mvmr.ops.projection import PROJECTION_VERSION, Projection
from mvmr.representations import cache_store
from mvmr.representations.base import Representation
from mvmr.representations.cache_entries import KIND, CacheEntry, clear, entries
from mvmr.representations.cache_store import REMEDY, CachedRows, ShardWriter, Store
from mvmr.types import Section

__all__ = ["CacheConfig", "CacheEntry", "CacheRequest", "CachedRows", "cache_representations", "clear", "entries"]

FORMAT_VERSION = 1
"""Of the files; raised when they change, so that older ones are left alone."""
ROUNDS = 3
"""How often shards are made that another process removes meanwhile."""


class CacheConfig(Section):
    """What is kept of the representations of the plain images."""

    enabled: bool = True
    """Compute once what does not change from epoch to epoch; false computes it at every step."""
    width: int | None = Field(4096, ge=16)
    """Hand-crafted features wider than this are kept as a random projection to it; none: exact."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the kept values; look-ups give float32."""


def _no_barrier() -> None:
    """One process waits for nobody."""


@dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """The run that asks: how it sees the images, and where and by whom the work is done."""

    size: int
    """Side of the plain images."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: Path | None
    """data.cache."""
    device: torch.device
    workers: int = 0
    """Processes that read images."""
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = _no_barrier
    """Waits for all ranks."""
    progress: Progress | None = None
    batch_size: int = 256
    """Images computed at a time; the largest number up to this that divides a shard."""


@dataclass
class _Plan:
    """One representation to keep."""

    name: str
    representation: Representation
    projection: Projection
    """The identity where rows are kept whole."""
    store: Store
    missing: set[int] = field(default_factory=set)
    """Shards that are not there yet."""

    @torch.no_grad()
    def rows(self, images: Tensor, first: int) -> Tensor:
        """What is kept of images [b, 3, S, S], the first of which is number `first`: [b, width] on the CPU."""
        values = self.projection(self.representation(images).flatten(1))
        narrow = values.to(self.store.dtype)
        finite = narrow.isfinite().all(1)
        if not bool(finite.all()):
            self._refuse(values[~finite], first + int(torch.nonzero(~finite)[0]))
        return narrow.cpu()

    def _refuse(self, values: Tensor, image: int) -> None:
        where = f"representations.{self.name}: image {image}"
        if bool(values.isfinite().all()):
            raise RunError(f"{where} has values up to {values.abs().amax():.3g}, too large for "
                           f"float16 (65504); set cache.dtype=float32")  # fmt: skip
        raise RunError(
            f"{where} has values that are not finite, in cache.dtype=float32 too: leave this representation out, or "
            "look at that image and at the representation's settings"
        )


def cache_representations(
    source: ImageSource, representations: nn.ModuleDict, config: CacheConfig, *, request: CacheRequest
) -> dict[str, CachedRows]:
    """The rows of every representation that is fixed, costly and known by its fingerprint: {name: [N, F]}.

    What is not yet in the cache folder is computed in one pass over the images, of which each rank takes its share; a
    pass that was interrupted is continued. Representations that are returned are left on the CPU. All ranks call it.
    Raises RunError for a full disk and for values that cannot be kept, UserError for a folder that cannot be written.
    """
    wanted = {
        name: representation for name, representation in representations.items()
        if isinstance(representation, Representation) and not (representation.varies or representation.cheap)
    }  # fmt: skip
    if not config.enabled or not wanted:
        return {}
    keys: dict[str, str] = {}
    plans: dict[str, _Plan] = {}
    failures: list[Exception] = []

    def together(work: Callable[[], None]) -> None:
        """Do this rank's part; one that fails still meets the others, who would wait for it."""
        try:
            if not failures:
                work()
        except Exception as error:
            failures.append(error)
        request.barrier()

    together(lambda: _plan(source, wanted, config, request, keys, plans))
    if request.world_size > 1:
        together(lambda: _build(source, list(plans.values()), request, share=True))
    if failures:
        raise failures[0]
    _complete(source, list(plans.values()), request)
    for name in keys:
        wanted[name].to("cpu")
    opened = {key: plan.store.open() for key, plan in plans.items()}
    return {name: opened[key] for name, key in keys.items()}


def _plan(
    source: ImageSource,
    wanted: dict[str, Representation],
    config: CacheConfig,
    request: CacheRequest,
    keys: dict[str, str],
    plans: dict[str, _Plan],
) -> None:
    """Fill {name: key} and {key: plan}, look for the shards that are there, and for room for the others."""
    folder = cache_folder(request.folder, KIND)
    for name, representation in wanted.items():
        fingerprint = representation.fingerprint()
        if fingerprint is None:
            continue
        probe = torch.zeros(1, 3, request.size, request.size, device=request.device)
        with torch.no_grad():
            features = representation.to(request.device)(probe).flatten(1).shape[1]
        whole = representation.learned or config.width is None
        projection = Projection(features, features if whole else config.width or features)
        parts = _key_parts(source, fingerprint, projection, config, request)
        keys[name] = key = digest(json.dumps(parts, sort_keys=True).encode())
        if key in plans:  # two names for the same thing
            continue
        about = {
            "name": name, "kind": type(representation).__name__, "data": source.name, "images": len(source),
            "width": projection.width, "projected_from": None if projection.is_identity else features,
            "dtype": config.dtype, "rows_per_shard": parts["rows_per_shard"], "key_parts": parts,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        store = Store(
            folder / key, images=len(source), width=projection.width, dtype=getattr(torch, config.dtype), about=about
        )
        store.prepare()
        plans[key] = _Plan(name, representation, projection, store, set(store.missing(range(store.shards))))
    _need_room(folder, plans.values())


def _key_parts(
    source: ImageSource, fingerprint: str, projection: Projection, config: CacheConfig, request: CacheRequest
) -> dict[str, Any]:
    """All that the kept bytes depend on; names and folders are not of it."""
    return {
        "format": FORMAT_VERSION, "byte_order": sys.byteorder, "rows_per_shard": cache_store.ROWS_PER_SHARD,
        "data": source.fingerprint, "images": len(source), "size": request.size,
        "mean": [float(value) for value in request.mean], "std": [float(value) for value in request.std],
        "representation": fingerprint, "width": projection.width, "dtype": config.dtype,
        "projection": None if projection.is_identity else PROJECTION_VERSION,
    }  # fmt: skip


def _complete(source: ImageSource, plans: Sequence[_Plan], request: CacheRequest) -> None:
    """Make what is still missing where this process looks: all of it on one process, other nodes' shards on several.

    Under the keys' locks, so that of several processes one works and the others then find its result.
    """
    for _ in range(ROUNDS):
        unfinished = _unfinished(plans)
        if not unfinished:
            return
        with ExitStack() as locks:
            for plan in unfinished:  # in the same order by everybody
                locks.enter_context(locked(plan.store.folder))
            for plan in unfinished:
                plan.store.prepare()
                plan.missing = set(plan.store.missing(sorted(plan.missing), warn=False))
            _need_room(unfinished[0].store.folder.parent, unfinished)
            _build(source, unfinished, request, share=False)
    if _unfinished(plans):
        raise RunError(
            f"{plans[0].store.folder.parent}: finished parts are removed by somebody else while they are made; stop "
            "that, or set data.cache=DIR or cache=off"
        )


def _unfinished(plans: Sequence[_Plan]) -> list[_Plan]:
    """Plans that lack shards, finished ones that were removed meanwhile included, in the order of their keys."""
    for plan in plans:
        plan.missing |= plan.store.absent()
    return sorted((plan for plan in plans if plan.missing), key=lambda plan: plan.store.folder)


def _build(source: ImageSource, plans: Sequence[_Plan], request: CacheRequest, *, share: bool) -> None:
    """One pass over the images of all missing shards, or of this rank's share of them."""
    numbers = sorted(set().union(*(plan.missing for plan in plans)))
    if share:
        numbers = numbers[request.rank :: request.world_size]
    if not numbers:
        return
    span = plans[0].store.span
    done, total = 0, sum(stop - first for first, stop in map(span, numbers))
    with closing(_images(source, plans[0].store, numbers, request)) as batches:
        for number in numbers:
            first, stop = span(number)
            with ExitStack() as files:
                lacking = [plan for plan in plans if number in plan.missing]
                writers = [files.enter_context(ShardWriter(plan.store, number)) for plan in lacking]
                while first < stop:
                    images = next(batches)
                    for plan, writer in zip(lacking, writers, strict=True):
                        writer.write(plan.rows(images, first))
                    first, done = first + len(images), done + len(images)
                    if request.progress:
                        request.progress("representations", done, total)
            for plan, writer in zip(lacking, writers, strict=True):
                if writer.is_in_place:
                    plan.missing.discard(number)


def _images(
    source: ImageSource, store: Store, numbers: Sequence[int], request: CacheRequest
) -> Generator[Tensor, None, None]:
    """Normalised plain images [b, 3, S, S] of some shards on the device; no batch holds images of two shards.

    Batches begin where shards do, so the rows do not depend on which shards are made in one go.
    """
    rows = store.rows_per_shard
    batch_size = next(size for size in range(min(request.batch_size, rows), 0, -1) if rows % size == 0)
    spans = [torch.arange(*store.span(number)) for number in numbers]
    # Images in memory are taken shard by shard, without a copy of them all; workers are started once.
    resident = isinstance(source, ArraySource) and not source.is_mapped
    for indices in spans if resident else [torch.cat(spans)]:
        part = source if len(indices) == len(source) else subset(source, indices)
        for _, images in plain_batches(part, batch_size=batch_size, size=request.size, workers=request.workers):
            yield normalise(as_float(images.to(request.device, non_blocking=True)), request.mean, request.std)


def _need_room(folder: Path, plans: Iterable[_Plan]) -> None:
    need = sum(plan.store.size(shard) for plan in plans for shard in plan.missing)
    free = shutil.disk_usage(folder).free if need else 0
    if need > free:
        raise RunError(f"{folder}: the cache of representations needs {need / 1e9:.3g} GB more and "
                       f"{free / 1e9:.3g} GB are free; {REMEDY}")  # fmt: skip
