"""k-means over the rows of all ranks, none of which ever holds them all (Lloyd, "Least squares quantization in PCM",
1982; spherical: Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", 2001).

Every rank works on its own rows, and sends a table of K rows an iteration. The table's sums are of integers (fixed
point), which add up to the same in any order: labels depend neither on the number of ranks nor on the order in which a
GPU adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.errors import NOT_FINITE, RunError
from mvmr.ops.collectives import all_reduce_sum, gather
from mvmr.ops.precision import full_float32
from mvmr.ops.random import uniform

__all__ = ["Clustering", "drawn_rows", "kmeans"]

ROW_STREAM, DONOR_STREAM, DIRECTION_STREAM = 0xFFFFFFF0, 0xFFFFFFF1, 0xFFFFFFF2
"""Random streams, far from those of views."""
PUSH = 0.05
"""How far from its donor's centroid a cluster that was empty starts, in the donor's root mean square distances."""
REPAIRS = 8
"""After the last move of the centroids, clusters that are empty are tried so often."""


@dataclass(frozen=True)
class Clustering:
    """What k-means found; equal on all ranks but for `labels`, which are of this rank's rows."""

    centroids: Tensor
    """[K, D], float32 or float64; `labels` name the nearest."""
    labels: Tensor
    """[n] int64 in 0 .. K - 1."""
    sizes: Tensor
    """[K] int64, members over all ranks."""
    inertia: list[float]
    """Sum over all rows of the squared distance to the nearest centroid, at every assignment; it never rises."""


@torch.no_grad()
def kmeans(
    x: Tensor,
    start: Tensor,
    *,
    iterations: int = 20,
    spherical: bool = False,
    empty: Literal["split", "keep"] = "split",
    seed: int = 0,
    memory: int = 64,
) -> Clustering:
    """Lloyd's iterations over x [n, D], this rank's rows, from the centroids `start` [K, D], equal on all ranks.

    iterations: at most so many moves of the centroids; fewer where no label changes any more. spherical: for rows of
    unit norm; centroids are normalised, so that the nearest has the largest dot product. empty: "split" puts the
    centroid of an empty cluster beside that of a random other one, and the two share its members (DeepCluster, Section
    3.3); a cluster stays empty only where distinct rows are fewer than clusters. "keep" leaves its centroid where it
    is. seed: of these draws. memory: MiB of working space for a part of the rows, beside x and tables of [K, D + 2].
    Distances are taken in float32 (float64 for such rows) after the rows' mean is subtracted. The ranks' n may differ,
    and be 0. Raises ValueError for shapes that do not fit, and where no rank has a row; RunError, on all ranks at
    once, where a row of any is not finite.
    """
    if x.dim() != 2 or start.dim() != 2 or x.shape[1] != start.shape[1] or not len(start):
        raise ValueError(f"k-means takes rows [n, D] and a start [K, D], not {tuple(x.shape)} and {tuple(start.shape)}")
    with torch.autocast(x.device.type, enabled=False), full_float32(x.device.type):
        search = _Search(x, clusters=len(start), spherical=spherical, memory=memory)
        centroids = search.on_sphere(start.to(search.dtype) - search.centre)
        found = search.nearest(centroids)
        history = [found.inertia]
        for number in range(iterations + REPAIRS):
            if number < iterations:
                centroids = search.on_sphere(found.means(centroids))
            vacant = found.vacant(seed, number) if empty == "split" else None
            if vacant is not None:
                centroids[vacant.clusters] = search.on_sphere(centroids[vacant.donors] + vacant.pushes.to(search.dtype))
            elif number >= iterations:
                break
            before, found = found.labels, search.nearest(centroids)
            history.append(found.inertia)
            if vacant is None and not int(all_reduce_sum((before != found.labels).sum())):
                break
        return Clustering(centroids + search.centre, found.labels, found.sizes, history)


@torch.no_grad()
def drawn_rows(x: Tensor, index: Tensor, count: int, *, seed: int) -> Tensor:
    """`count` different rows of all ranks' x [n, D], drawn at random and equal on all ranks: [count, D].

    index: [n] int64, the rows' positions in the whole data set; which are drawn is a function of (seed, positions), so
    the same on any number of ranks. Where rows are fewer than `count`, they are repeated in turn.
    Raises ValueError where no rank has a row.
    """
    keys = torch.cat([_random_keys(part, seed) for part in index.cpu().split(1 << 16)])
    least = keys.topk(min(count, len(keys)), largest=False).values
    none = torch.iinfo(torch.int64).max
    candidates = torch.cat([least, torch.full((count - len(least),), none)])  # every rank sends equally many
    chosen = gather(candidates.to(x.device)).sort().values[:count].cpu()
    chosen = chosen[chosen < none]
    if not len(chosen):
        raise ValueError("there is no row to start a cluster from")
    place = torch.searchsorted(chosen, keys).clamp_(max=len(chosen) - 1)  # [n]
    own = chosen[place] == keys
    rows = x.new_zeros(len(chosen), x.shape[1])
    rows[place[own].to(x.device)] = x[own.to(x.device)]
    return all_reduce_sum(rows)[torch.arange(count, device=x.device) % len(chosen)]


def _random_keys(index: Tensor, seed: int) -> Tensor:
    """63 random bits of each position, [n] int64: ties are as good as impossible."""
    words = uniform(seed, 0, index, ROW_STREAM, 2).mul_(2.0**32).long()  # [n, 2], whole numbers below 2^32
    return words[:, 0].bitwise_left_shift(31).bitwise_or_(words[:, 1] >> 1)


@dataclass(frozen=True)
class _Vacant:
    clusters: Tensor
    """[E], the clusters without members."""
    donors: Tensor
    """[E], the cluster that each is put beside."""
    pushes: Tensor
    """[E, D], by how much."""


@dataclass(frozen=True)
class _Found:
    """One assignment: labels of this rank's rows, and sums over all ranks' rows."""

    labels: Tensor
    sums: Tensor
    """[K, D] float64, of the members."""
    spreads: Tensor
    """[K] float64, of their squared distances."""
    sizes: Tensor
    """[K] int64."""

    @property
    def inertia(self) -> float:
        return float(self.spreads.sum())

    def means(self, centroids: Tensor) -> Tensor:
        """The members' means; empty clusters keep their centroid."""
        means = self.sums / self.sizes.clamp(min=1).unsqueeze(1)
        return torch.where(self.sizes.unsqueeze(1) > 0, means.to(centroids.dtype), centroids)

    def vacant(self, seed: int, number: int) -> _Vacant | None:
        """Where empty clusters go; None where there is none, or nothing to share with it."""
        clusters = (self.sizes == 0).nonzero().squeeze(1)
        # A cluster of one row, or of equal ones, cannot be shared.
        donors = ((self.sizes > 1) & (self.spreads > 0)).nonzero().squeeze(1)
        if not len(clusters) or not len(donors):
            return None
        names = clusters.cpu()
        drawn = (uniform(seed, number, names, DONOR_STREAM, 1)[:, 0] * len(donors)).long().to(donors.device)
        chosen = donors[drawn]
        directions = uniform(seed, number, names, DIRECTION_STREAM, self.sums.shape[1]).sub_(0.5)
        lengths = PUSH * (self.spreads[chosen] / self.sizes[chosen]).sqrt()
        pushes = functional.normalize(directions.to(lengths.device), dim=1) * lengths.unsqueeze(1)
        return _Vacant(clusters, chosen, pushes)


class _Search:
    """Finds the nearest centroid of every row, part by part, in coordinates whose origin is the rows' mean."""

    def __init__(self, x: Tensor, *, clusters: int, spherical: bool, memory: int):
        self.x, self.clusters, self.spherical = x, clusters, spherical
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows, width = x.shape
        total = int(all_reduce_sum(torch.tensor([rows], device=x.device)))
        if not total:
            raise ValueError("k-means needs rows, and no rank has any")
        # Of a part's rows: scores [b, K], the rows moved to the origin, the same in integers, and some single values.
        self.part = max(1, (memory << 20) // (self.dtype.itemsize * (clusters + width) + 8 * (width + 2) + 64))
        self.centre = (all_reduce_sum(self._sum()) / total).to(self.dtype)  # [D]
        reach = float(gather(self._furthest().unsqueeze(0)).max()) or 1.0
        if not math.isfinite(reach):
            raise RunError(NOT_FINITE)
        # Sums of `total` integers below 2^bits stay below 2^62.
        self.bits = 62 - total.bit_length()
        self.unit = reach * 2.0**-self.bits
        self.square = 4 * width * reach * reach * 2.0**-self.bits

    def _sum(self) -> Tensor:
        """Of this rank's rows: [D] float64, part by part, because torch converts what it adds up as a whole."""
        total = torch.zeros(self.x.shape[1], dtype=torch.float64, device=self.x.device)
        for rows in self.x.split(self.part):
            total += rows.sum(0, dtype=torch.float64)
        return total

    def _furthest(self) -> Tensor:
        """The largest coordinate in size of this rank's rows."""
        found = torch.zeros((), dtype=self.dtype, device=self.x.device)
        for rows in self.x.split(self.part) if len(self.x) else ():
            found = torch.maximum(found, (rows.to(self.dtype) - self.centre).abs().max())
        return found

    def on_sphere(self, centroids: Tensor) -> Tensor:
        """Centroids as they are, or in spherical k-means at norm 1 from the true origin."""
        return functional.normalize(centroids + self.centre, dim=1) - self.centre if self.spherical else centroids

    def nearest(self, centroids: Tensor) -> _Found:
        """The assignment to `centroids` [K, D]: argmin |x - c|^2 = argmax <x, c> - |c|^2 / 2."""
        width, eps = self.x.shape[1], torch.finfo(self.dtype).eps
        offsets = -0.5 * centroids.square().sum(1)  # [K]
        table = torch.zeros(self.clusters, width + 2, dtype=torch.int64, device=self.x.device)
        labels = torch.empty(len(self.x), dtype=torch.int64, device=self.x.device)
        # One working space for all parts: an allocator that is asked anew for each may keep several.
        most = min(self.part, len(self.x))
        space = offsets.new_empty(most, width), offsets.new_empty(most, self.clusters), table.new_ones(most, width + 2)
        for rows, own in zip(self.x.split(self.part), labels.split(self.part), strict=True):
            moved, scores, values = (part[: len(rows)] for part in space)
            torch.sub(rows.to(self.dtype), self.centre, out=moved)  # [b, D]
            best, nearest = torch.addmm(offsets, moved, centroids.T, out=scores).max(1)
            own.copy_(nearest)
            lengths = torch.linalg.vector_norm(moved, dim=1).square_()
            distances = lengths - 2 * best  # [b], squared
            distances[distances < 8 * eps * lengths] = 0  # rounding, which must not pass for a spread
            values[:, :width] = moved.div_(self.unit).round_()
            values[:, width] = distances.div_(self.square).round_()
            table.index_add_(0, nearest, values)  # the last column counts
        table = all_reduce_sum(table)
        sums = table[:, :width].double().mul_(self.unit)
        spreads = table[:, width].double().mul_(self.square)
        return _Found(labels, sums, spreads, table[:, width + 1].clone())  # no view, which would keep the whole table
