"""k-means against its definition and scikit-learn; the same labels on any number of ranks."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import normalize

from mvmr.data.sources import ArraySource, DataConfig, open_source
from mvmr.errors import RunError
from mvmr.ops.kmeans import Clustering, _Search, drawn_rows, kmeans
from mvmr.ops.whitening import whitening_of
from mvmr.representations.hog import HOG
from ranks import run_on_ranks


def rows(count: int = 60, width: int = 5, *, seed: int = 0) -> Tensor:
    """Float64 blobs, not around the origin."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.randn(6, width, generator=generator, dtype=torch.float64) * 3 + 10
    return blobs[torch.arange(count) % 6] + torch.randn(count, width, generator=generator, dtype=torch.float64)


def digits() -> Tensor:
    return torch.from_numpy(load_digits().data).float()


def slow(x: Tensor, start: Tensor, iterations: int, *, spherical: bool) -> tuple[list[list[float]], list[int]]:
    """Lloyd's algorithm as it is defined: centroids, and the nearest of them to each row."""
    centroids = [c.tolist() for c in start]

    def nearest(row: list[float]) -> int:
        distances = [sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in centroids]
        return distances.index(min(distances))

    for _ in range(iterations):
        labels = [nearest(row) for row in x.tolist()]
        for k in range(len(centroids)):
            own = [row for row, label in zip(x.tolist(), labels, strict=True) if label == k]
            if own:
                mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
                length = sum(v * v for v in mean) ** 0.5 if spherical else 1.0
                centroids[k] = [v / length for v in mean]
    return centroids, [nearest(row) for row in x.tolist()]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_equals_the_definition(iterations: int, spherical: bool) -> None:
    x = normalize(rows() - 10, dim=1) if spherical else rows()
    start = x[:6]
    found = kmeans(x, start, iterations=iterations, spherical=spherical)
    centroids, labels = slow(x, start, iterations, spherical=spherical)
    torch.testing.assert_close(found.centroids, torch.tensor(centroids, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert found.labels.tolist() == labels
    assert found.sizes.tolist() == [labels.count(k) for k in range(6)]
    exact = (x - found.centroids[found.labels]).square().sum().item()
    assert found.inertia[-1] == pytest.approx(exact, rel=1e-9)


def test_spherical_is_the_largest_dot_product_of_unit_centroids() -> None:
    x = normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + 0.5, dim=1)
    found = kmeans(x, drawn_rows(x, torch.arange(500), 20, seed=1), spherical=True, empty="keep")
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(20))
    assert torch.equal((x @ found.centroids.T).argmax(1), found.labels)


def test_from_one_start_scikit_learn_gets_there_too() -> None:
    x = digits()
    start = drawn_rows(x, torch.arange(len(x)), 40, seed=0)
    found = kmeans(x, start, iterations=300)
    theirs = KMeans(40, init=start.numpy(), n_init=1, max_iter=300, tol=0.0).fit(x.numpy())
    assert found.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-5)
    assert np.array_equal(found.labels.numpy(), theirs.labels_)


def test_objective_is_within_one_percent_of_scikit_learns_on_real_images() -> None:
    x = digits()
    ours = [kmeans(x, drawn_rows(x, torch.arange(len(x)), 30, seed=seed)).inertia[-1] for seed in range(5)]
    once = {"init": "random", "n_init": 1, "max_iter": 20, "tol": 0.0}
    theirs = [KMeans(30, random_state=seed, **once).fit(x).inertia_ for seed in range(5)]
    assert np.mean(ours) < 1.01 * np.mean(theirs)


@pytest.mark.parametrize("start", ["drawn", "equal", "far"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("empty", ["split", "keep"])
def test_inertia_never_rises(empty: str, spherical: bool, start: str) -> None:
    x = normalize(digits() - 5, dim=1) if spherical else digits() + 1000
    first = {
        "drawn": drawn_rows(x, torch.arange(len(x)), 25, seed=3),
        "equal": x[:1].expand(25, -1),
        "far": torch.cat([x[:5], x[:20] * -50]),
    }[start]
    history = kmeans(x, first, spherical=spherical, empty=empty, iterations=15).inertia  # type: ignore[arg-type]
    assert len(history) > 1
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(history))
    assert history[-1] < history[0] or (empty == "keep" and start == "equal")


@pytest.mark.parametrize("iterations", [1, 10])
def test_empty_clusters_are_filled(iterations: int) -> None:
    x = digits()
    found = kmeans(x, x[:1].expand(50, -1), iterations=iterations)
    assert found.sizes.min() > 0
    assert found.sizes.sum() == len(x)
    assert torch.equal(found.sizes, found.labels.bincount(minlength=50))
    kept = kmeans(x, torch.cat([x[:4], x[:1] + 1000]), iterations=iterations, empty="keep")
    assert kept.sizes[4] == 0
    torch.testing.assert_close(kept.centroids[4], x[0] + 1000)


def test_the_start_stays_as_it_is() -> None:
    x, start = digits(), torch.zeros(10, 64)
    kmeans(x, start, iterations=2)
    assert torch.equal(start, torch.zeros(10, 64))


def test_filled_from_other_clusters_as_the_seed_says() -> None:
    x = digits()
    first, again, other = (kmeans(x, x[:1].expand(20, -1), iterations=3, seed=seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clusters_beyond_distinct_rows_stay_empty() -> None:
    distinct = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    x = distinct[torch.arange(100) % 5]
    found = kmeans(x, drawn_rows(x, torch.arange(100), 8, seed=0))
    assert int((found.sizes > 0).sum()) == 5
    assert found.inertia[-1] == 0
    torch.testing.assert_close(found.centroids[found.labels], x)
    few = kmeans(x[:3], drawn_rows(x[:3], torch.arange(3), 8, seed=0))
    assert sorted(few.labels.tolist()) == sorted(set(few.labels.tolist()))


def test_far_from_the_origin_nothing_is_lost() -> None:
    """Without the mean subtracted, float32 has no digit left for these differences."""
    x = rows(300, 8).float() - 10
    start = x[:6]
    near, far = kmeans(x, start), kmeans(x + 10_000, start + 10_000)
    assert torch.equal(near.labels, far.labels)


def test_autocast_does_not_reach_the_distances() -> None:
    x = digits() + 100
    start = drawn_rows(x, torch.arange(len(x)), 30, seed=0)
    exact = kmeans(x, start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kmeans(x, start)
    assert torch.equal(found.labels, exact.labels)
    assert torch.equal(found.centroids, exact.centroids)


def test_working_space_is_bounded_and_changes_nothing() -> None:
    x = digits().repeat(3, 1)
    start = drawn_rows(x, torch.arange(len(x)), 500, seed=0)
    small, large = kmeans(x, start, iterations=3, memory=1), kmeans(x, start, iterations=3, memory=1000)
    assert torch.equal(small.labels, large.labels)
    assert torch.equal(small.centroids, large.centroids)
    part = _Search(x, clusters=500, spherical=False, memory=1).part
    scores, moved, integers = 500 * 4, 64 * 4, (64 + 2) * 8  # bytes a row
    assert 1 < part < len(x)
    assert part * (scores + moved + integers) < 2**20


def test_stops_where_nothing_changes() -> None:
    x = rows()
    assert len(kmeans(x, x[:6], iterations=1000).inertia) < 50


@pytest.mark.parametrize(
    ("x", "start"), [((4, 3), (2, 2)), ((4,), (2, 4)), ((4, 3), (0, 3)), ((0, 3), (2, 3)), ((4, 3, 2), (2, 3))]
)
def test_what_does_not_fit_is_refused(x: tuple[int, ...], start: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="k-means"):
        kmeans(torch.zeros(x), torch.zeros(start))


def test_drawn_rows_are_a_function_of_seed_and_position() -> None:
    x, index = torch.arange(200.0).unsqueeze(1), torch.arange(200)
    drawn = drawn_rows(x, index, 50, seed=4)
    assert len(drawn.unique()) == 50, "none twice"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn_rows(x[order], index[order], 50, seed=4), drawn)
    assert not torch.equal(drawn_rows(x, index, 50, seed=5), drawn)
    # Each position is as likely as any other: 400 draws of 50 of 200, which are binomial with deviation 8.7.
    counts = torch.stack([drawn_rows(x, index, 50, seed=seed).long() for seed in range(400)]).flatten().bincount()
    assert counts.min() > 60
    assert counts.max() < 140


def test_rows_are_repeated_where_there_are_too_few() -> None:
    x = torch.arange(3.0).unsqueeze(1)
    drawn = drawn_rows(x, torch.arange(3), 7, seed=0).flatten()
    assert drawn[:3].sort().values.tolist() == [0, 1, 2]
    assert torch.equal(drawn[3:6], drawn[:3])
    with pytest.raises(ValueError, match="no row"):
        drawn_rows(x[:0], torch.arange(0), 2, seed=0)


def on_rank(rank: int, ranks: int, parts: list[list[int]], start: str) -> tuple[Tensor, Clustering]:
    """Clustering by a rank that has the rows at parts[rank] only."""
    x = digits()
    index = torch.tensor(parts[rank], dtype=torch.int64)
    first = drawn_rows(x[index], index, 40, seed=7) if start == "drawn" else x[:1].expand(40, -1)
    return index, kmeans(x[index], first, iterations=8)


@pytest.mark.parametrize("start", ["drawn", "equal"])
def test_ranks_find_what_one_process_finds_bit_for_bit(start: str) -> None:
    everything = list(range(1797))
    _, whole = on_rank(0, 1, [everything], start)
    for parts in ([everything[0::2], everything[1::2]], [everything[1000:], everything[:1000]], [everything, []]):
        for index, found in run_on_ranks(on_rank, 2, 2, parts, start):
            assert torch.equal(found.labels, whole.labels[index])
            assert torch.equal(found.centroids, whole.centroids)
            assert torch.equal(found.sizes, whole.sizes)
            assert found.inertia == whole.inertia


def test_lower_precision_of_matrix_products_is_not_used() -> None:
    x = digits() + 100
    start = drawn_rows(x, torch.arange(len(x)), 30, seed=0)
    exact = kmeans(x, start)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(kmeans(x, start).labels, exact.labels)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    x = digits().clone()
    x[7, 3] = value
    with pytest.raises(RunError, match=r"not finite.*last checkpoint is intact"):
        kmeans(x, x[20:30].clone())


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA, with CIFAR-10's folder, is not set")
@pytest.mark.parametrize("clusters", [100, 300])
def test_objective_on_features_of_cifar10_is_within_one_percent_of_scikit_learns(clusters: int) -> None:
    """HOG of 10,000 training images, whitened and of norm 1 as DeepCluster's features are; starts of k-means++."""
    source = open_source(DataConfig(name="cifar10", root=Path(os.environ["MVMR_TEST_DATA"])), "pretrain", size=32)
    assert isinstance(source, ArraySource)
    images = source.gather(torch.arange(10_000)).float() / 255
    raw = HOG()(images).flatten(1)
    x = normalize(whitening_of(raw, 128)(raw), dim=1)
    ours = kmeans(x, drawn_rows(x, torch.arange(len(x)), clusters, seed=0)).inertia[-1]
    theirs = KMeans(clusters, n_init=1, max_iter=20, tol=0.0, random_state=0).fit(x.numpy()).inertia_
    assert ours < 1.01 * theirs
