"""Clustering's measures against scikit-learn, scipy and exhaustive search, and k-means' choice among its starts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.clusters import (
    ClusteringConfig,
    adjusted_rand_index,
    agreement,
    best_of_starts,
    clustering,
    contingency,
    expected_information,
    found_clusters,
    matched,
)
from mvmr.evaluation.intervals import mean_interval
from mvmr.types import Features, RunError, UserError

MEASURES = {
    "nmi": normalized_mutual_info_score,
    "ami": adjusted_mutual_info_score,
    "ari": adjusted_rand_score,
}


def labellings(kind: str, count: int = 300) -> tuple[Tensor, Tensor]:
    """Clusters and classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 6, (count,), generator=generator)
    other = torch.randint(0, 9, (count,), generator=generator)
    noisy = torch.where(torch.rand(count, generator=generator) < 0.6, (y + 2) % 6, other)
    skewed = torch.where(torch.rand(count, generator=generator) < 0.9, torch.zeros_like(y), y)
    return {
        "random": (other, y),
        "noisy": (noisy, y),
        "skewed": (skewed, y),
        "same": (10 - 3 * y, y),
        "finer": (y * 4 + other % 4, y),
        "coarser": (y // 2, y),
        "single": (torch.zeros_like(y), y),
        "both single": (torch.zeros_like(y), torch.full_like(y, 7)),
        "one image each": (torch.arange(count), y),
    }[kind]


KINDS = ["random", "noisy", "skewed", "same", "finer", "coarser", "single", "both single", "one image each"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_measures_are_scikit_learns(kind: str) -> None:
    labels, y = labellings(kind)
    found = agreement(labels, y)
    assert list(found) == ["accuracy", "nmi", "ami", "ari"]
    for name, theirs in MEASURES.items():
        assert found[name] / 100 == pytest.approx(theirs(y.numpy(), labels.numpy()), abs=1e-9)
    table = contingency(labels, y)
    assert expected_information(table) == pytest.approx(
        expected_mutual_information(table.numpy(), len(y)), rel=1e-8, abs=1e-12
    )
    other = agreement(y * 5 - 3, labels)  # symmetric, and names do not count
    assert other == pytest.approx(found, abs=1e-9)


def test_large_counts_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (40_000,), generator=generator)
    labels = torch.where(torch.rand(40_000, generator=generator) < 0.7, y, torch.randint(0, 14, y.shape))
    found = agreement(labels, y)
    for name, theirs in MEASURES.items():
        assert found[name] / 100 == pytest.approx(theirs(y.numpy(), labels.numpy()), abs=1e-9)


def test_the_definitions_by_counting_pairs_and_tables() -> None:
    generator = torch.Generator().manual_seed(3)
    labels, y = torch.randint(0, 3, (7,), generator=generator), torch.randint(0, 2, (7,), generator=generator)
    pairs = list(itertools.combinations(range(7), 2))
    together = {name: {p for p in pairs if of[p[0]] == of[p[1]]} for name, of in (("labels", labels), ("y", y))}
    both, first, second = len(together["labels"] & together["y"]), len(together["labels"]), len(together["y"])
    expected = first * second / len(pairs)
    value = (both - expected) / ((first + second) / 2 - expected)
    assert adjusted_rand_index(contingency(labels, y)) == pytest.approx(value, abs=1e-12)

    def information(a: tuple[int, ...], b: list[int]) -> float:
        total = 0.0
        for k, c in itertools.product(set(a), set(b)):
            n = sum(i == k and j == c for i, j in zip(a, b, strict=True))
            total += n / 7 * math.log(7 * n / (a.count(k) * b.count(c))) if n else 0.0
        return total

    orders = list(itertools.permutations(labels.tolist()))
    mean = sum(information(order, y.tolist()) for order in orders) / len(orders)
    assert expected_information(contingency(labels, y)) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("clusters", [2, 4, 5])
def test_the_assignment_is_the_best_of_all(clusters: int) -> None:
    generator = torch.Generator().manual_seed(clusters)
    for _ in range(10):
        labels, y = (
            torch.randint(0, clusters, (30,), generator=generator),
            torch.randint(0, 4, (30,), generator=generator),
        )
        classes = [*range(4), *[None] * max(0, clusters - 4)]
        best = 0
        for order in itertools.permutations(classes, clusters):
            best = max(best, sum(order[k] == c for k, c in zip(labels.tolist(), y.tolist(), strict=True)))
        right = matched(labels, y)
        assert right.dtype == torch.bool
        assert int(right.sum()) == best
        assert agreement(labels, y)["accuracy"] == pytest.approx(100 * best / 30)
        for k in range(clusters):  # the images of a cluster that are right share one class, which no other has
            assert len(y[right & (labels == k)].unique()) <= 1
        given = [tuple(y[right & (labels == k)].unique().tolist()) for k in range(clusters)]
        assert len({one for one in given if one}) == sum(bool(one) for one in given)


def test_chance_is_zero_where_it_is_taken_off() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [
        agreement(*torch.randint(0, 20, (2, 200), generator=generator))
        for _ in range(30)
    ]  # fmt: skip
    mean = {name: sum(value[name] for value in values) / 30 for name in values[0]}
    assert mean["ami"] == pytest.approx(0, abs=1)
    assert mean["ari"] == pytest.approx(0, abs=1)
    assert mean["nmi"] > 20  # which is why the adjusted ones are there


# --- k-means --------------------------------------------------------------------------------------------------------


def digits_split() -> tuple[Features, Features]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    names = tuple(str(number) for number in range(10))
    return Features(x[:900], y[:900], names), Features(x[900:], y[900:], names)


def test_inertia_is_within_a_percent_of_scikit_learns() -> None:
    _, test = digits_split()
    unit = functional.normalize(test.x, dim=1)
    found = best_of_starts(unit, 10, starts=5, iterations=300, seed=0)
    reference = KMeans(10, n_init=5, random_state=0).fit(unit.numpy())
    assert found.inertia[-1] <= 1.01 * reference.inertia_
    assert found.inertia[-1] == pytest.approx((unit - found.centroids[found.labels]).square().sum().item(), rel=1e-4)


def test_the_best_start_counts_and_the_seed_alone_decides() -> None:
    _, test = digits_split()
    unit = functional.normalize(test.x[:300], dim=1)
    single = [best_of_starts(unit, 10, starts=n, iterations=50, seed=1).inertia[-1] for n in range(1, 7)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(single))
    assert single[-1] < single[0]
    config = ClusteringConfig(starts=2)
    torch.manual_seed(0)
    first = found_clusters(test, test, config)
    torch.manual_seed(1)
    assert torch.equal(found_clusters(test, test, config), first)
    assert not torch.equal(found_clusters(test, test, config.model_copy(update={"seed": 1})), first)


def test_separate_classes_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(5, 16, generator=generator), dim=1)
    y = torch.arange(200) % 5
    x = centres[y] + 0.05 * torch.randn(200, 16, generator=generator)
    lengths = 0.1 + 10 * torch.rand(200, 1, generator=generator)  # which do not count
    blobs = Features(x * lengths, y)
    for fit in ("test", "train"):
        assert clustering(blobs, blobs, ClusteringConfig(fit=fit)) == {
            "accuracy": 100.0, "nmi": 100.0, "ami": 100.0, "ari": 100.0,
        }  # fmt: skip


def test_digits_by_either_split() -> None:
    train, test = digits_split()
    of_test = clustering(Features(train.x[:0]), test, ClusteringConfig(starts=3))  # the training images do not count
    assert of_test["accuracy"] > 60
    config = ClusteringConfig(starts=3, fit="train")
    labels = found_clusters(train, test, config)
    unit, unit_test = (functional.normalize(part.x, dim=1) for part in (train, test))
    best = best_of_starts(unit, 10, starts=3, iterations=300, seed=0)
    assert torch.equal(labels, torch.cdist(unit_test.double(), best.centroids.double()).argmin(1))
    metrics = clustering(Features(train.x), test, config)  # nor do the training labels
    assert metrics == agreement(labels, test.y)
    assert metrics["accuracy"] > 60
    interval = mean_interval(100.0 * matched(labels, test.y))
    assert interval.value == pytest.approx(metrics["accuracy"])
    assert interval.low < interval.value < interval.high


def test_the_number_of_clusters() -> None:
    _, test = digits_split()
    config = ClusteringConfig(starts=1, iterations=20)
    few = test.y < 4
    named, unnamed = Features(test.x[few], test.y[few], test.classes), Features(test.x[few], test.y[few])
    assert len(found_clusters(test, named, config).unique()) == 10
    assert len(found_clusters(test, unnamed, config).unique()) == 4
    assert len(found_clusters(test, named, config.model_copy(update={"clusters": 7})).unique()) == 7


def test_wrong_features() -> None:
    train, test = digits_split()
    with pytest.raises(UserError, match="test split has no labels"):
        clustering(train, Features(test.x), ClusteringConfig())
    with pytest.raises(RunError, match="test split has features that are not finite"):
        clustering(train, Features(test.x * math.nan, test.y), ClusteringConfig())
    with pytest.raises(RunError, match="train split has features that are not finite"):
        clustering(Features(train.x * math.inf), test, ClusteringConfig(fit="train"))
    with pytest.raises(UserError, match=r"\[900, 5\] in train and \[897, 64\] in test"):
        clustering(Features(train.x[:, :5]), test, ClusteringConfig(fit="train"))
    with pytest.raises(UserError, match=r"clustering\.clusters=898, but the test split has 897 images"):
        clustering(train, test, ClusteringConfig(clusters=898))
    with pytest.raises(UserError, match=r"clusters \[3\] and classes \[4\]"):
        agreement(torch.arange(3), torch.arange(4))


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    train, test = digits_split()
    moved = [Features(part.x.cuda(), part.y, part.classes) for part in (train, test)]
    for fit in ("test", "train"):
        config = ClusteringConfig(starts=2, fit=fit)
        assert clustering(*moved, config) == pytest.approx(clustering(train, test, config), abs=0.5)
