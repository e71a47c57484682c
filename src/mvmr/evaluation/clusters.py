"""Clustering of frozen features: k-means without labels, then how well the clusters agree with the classes."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.features import labelled
from mvmr.evaluation.measured import Metrics
from mvmr.ops.kmeans import Clustering, drawn_rows, kmeans
from mvmr.ops.random import step_seed
from mvmr.types import Features, RunError, Section, UserError


class ClusteringConfig(Section):
    """Settings of `clustering`."""

    clusters: int | None = Field(default=None, ge=1)
    """k of k-means; null: the number of classes."""
    fit: Literal["test", "train"] = "test"
    """Split whose features k-means is run on. The agreement with the classes is that of the test split either way; with
    train, its images belong to the nearest centroid."""
    starts: int = Field(default=10, ge=1)
    """Runs of k-means from different random images; the one with the least inertia counts."""
    iterations: int = Field(default=300, ge=1)
    """Moves of the centroids at most; fewer where no image changes its cluster any more."""
    seed: int = Field(default=0, ge=0)
    """Seed of the starts."""


def splits(config: ClusteringConfig) -> tuple[str, str]:
    """Which splits `clustering` looks at, as its train and test: with fit=test, no training image is wanted."""
    return config.fit, "test"


def clustering(train: Features, test: Features, config: ClusteringConfig) -> Metrics:
    """{"accuracy", "nmi", "ami", "ari"} in percent, of k-means on unit features against the test split's classes.

    No label enters k-means, nor the choice of its start. Raises UserError where test labels are missing or images are
    fewer than clusters, RunError where features are not finite.
    """
    _, y = labelled(test, "test")
    labels, y = found_clusters(train, test, config).cpu(), y.cpu()
    # With the clusters as they are: other images would move the centroids too. NMI, AMI and ARI have no such interval:
    # an image that a resample draws twice agrees with itself, and lifts them all.
    return Metrics(agreement(labels, y), outcomes={"accuracy": 100.0 * matched(labels, y).double()})


def found_clusters(train: Features, test: Features, config: ClusteringConfig) -> Tensor:
    """The test images' clusters [M] int64 in 0 .. k - 1; raises as `clustering` does."""
    x, y = labelled(test, "test")
    fitted = x if config.fit == "test" else _of_train(train, x)
    count = config.clusters or len(test.classes) or len(y.unique())
    if count > len(fitted):
        raise UserError(
            f"clustering.clusters={count}, but the {config.fit} split has {len(fitted)} images; take fewer clusters, "
            "or more images"
        )
    best = best_of_starts(
        functional.normalize(fitted, dim=1), count, starts=config.starts, iterations=config.iterations, seed=config.seed
    )
    if config.fit == "test":
        return best.labels
    return kmeans(functional.normalize(x, dim=1), best.centroids, iterations=0, empty="keep").labels


def best_of_starts(x: Tensor, clusters: int, *, starts: int, iterations: int, seed: int) -> Clustering:
    """Of k-means on x [N, D] from `starts` draws of different rows, the one with the least inertia.

    A pure function of its arguments; of equal ones the earlier.
    """
    index, best = torch.arange(len(x)), None
    for number in range(starts):
        own = step_seed(seed, number, 0)
        found = kmeans(x, drawn_rows(x, index, clusters, seed=own), iterations=iterations, seed=own)
        if best is None or found.inertia[-1] < best.inertia[-1]:
            best = found
    assert best is not None
    return best


def agreement(labels: Tensor, y: Tensor) -> dict[str, float]:
    """{"accuracy", "nmi", "ami", "ari"} in percent, of clusters [M] and classes [M], whatever integers name them.

    "nmi" is the mutual information over the mean of the two entropies, "ami" the same with what chance gives taken off
    both (Vinh, Epps and Bailey, JMLR 2010).
    """
    table = contingency(labels, y)
    return {
        "accuracy": 100.0 * matched(labels, y).double().mean().item(),
        "nmi": normalised_information(table),
        "ami": normalised_information(table, expected=expected_information(table)),
        "ari": 100.0 * adjusted_rand_index(table),
    }


def normalised_information(table: Tensor, *, expected: float = 0.0) -> float:
    """Mutual information of a table [K, C] over the mean of the two entropies, less `expected` on both; in percent."""
    of_clusters, of_classes = _entropy(table.sum(1)), _entropy(table.sum(0))
    shared = max(0.0, of_clusters + of_classes - _entropy(table.flatten()))
    return 100.0 * _adjusted(shared, (of_clusters + of_classes) / 2, expected)


def matched(labels: Tensor, y: Tensor) -> Tensor:
    """Which images are right, bool [M], when each cluster is given one class so that the most are (Kuhn, 1955).

    No class is given twice: with more clusters than classes, the images of those left over are wrong.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    (_, labels), (names, y) = (each.cpu().unique(return_inverse=True) for each in (labels, y))
    rows, columns = linear_sum_assignment(contingency(labels, y).numpy(), maximize=True)
    given = torch.full((int(labels.max()) + 1,), len(names))  # no class
    given[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return given[labels] == y


def contingency(labels: Tensor, y: Tensor) -> Tensor:
    """[K, C] int64 on the CPU: how many images of each class [M] every cluster [M] has; empty ones are left out."""
    if labels.shape != y.shape or labels.ndim != 1 or len(y) == 0:
        raise UserError(f"clusters {list(labels.shape)} and classes {list(y.shape)} must be of the same images, [M]")
    (_, labels), (_, y) = (each.cpu().unique(return_inverse=True) for each in (labels, y))
    clusters, classes = int(labels.max()) + 1, int(y.max()) + 1
    return torch.bincount(labels * classes + y, minlength=clusters * classes).view(clusters, classes)


def adjusted_rand_index(table: Tensor) -> float:
    """Of a table [K, C] (Hubert and Arabie, Journal of Classification, 1985): 1 for equal partitions, 0 by chance.

    It may fall below 0.
    """

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1)).sum()) / 2

    both, of_clusters, of_classes = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    total = pairs(table.sum())
    expected = of_clusters * of_classes / total if total else 0.0
    most = (of_clusters + of_classes) / 2
    return 1.0 if both == most else (both - expected) / (most - expected)


def expected_information(table: Tensor) -> float:
    """Mutual information in nats that is expected of random partitions with the sums of a table [K, C].

    Vinh, Epps and Bailey, JMLR 2010: the mean over all orders of the labels, by the hypergeometric law of each cell.
    """
    images = int(table.sum())
    (rows, often), (columns, times) = (table.sum(axis).unique(return_counts=True) for axis in (1, 0))
    log_factorial = torch.arange(images + 1, dtype=torch.float64).add_(1).lgamma()
    of_columns = log_factorial[columns] + log_factorial[images - columns]  # [Uc]
    total = 0.0
    for size, count in zip(rows.tolist(), often.tolist(), strict=True):
        shared = torch.arange(1, min(size, int(columns.max())) + 1)  # [n], images that the two parts may have in common
        outside = images - size - columns[:, None] + shared  # [Uc, n], images that are in neither
        possible = (shared <= columns[:, None]) & (outside >= 0)
        chance = (
            (log_factorial[size] + log_factorial[images - size] + of_columns - log_factorial[images])[:, None]
            - log_factorial[shared]
            - log_factorial[size - shared]
            - log_factorial[(columns[:, None] - shared).clamp_min(0)]
            - log_factorial[outside.clamp_min(0)]
        ).exp()
        gain = shared.double() / images * (images * shared.double() / (size * columns[:, None])).log()
        total += count * float((times[:, None] * torch.where(possible, chance * gain, 0.0)).sum())
    return total


def _adjusted(shared: float, most: float, expected: float) -> float:
    """(I - E) / (max - E), and 1 for equal partitions, whose information may be no more than what chance gives."""
    return 1.0 if most - shared <= 1e-12 * (1 + most) else (shared - expected) / (most - expected)


def _entropy(counts: Tensor) -> float:
    """In nats, of the shares that the counts are of their sum."""
    shares = counts.double() / counts.sum()
    return float(-torch.special.xlogy(shares, shares).sum())


def _of_train(train: Features, x: Tensor) -> Tensor:
    """The training features [N, D] on the test features' device."""
    if train.x.ndim != 2 or train.x.shape[1:] != x.shape[1:]:
        raise UserError(f"features are {list(train.x.shape)} in train and {list(x.shape)} in test; use one encoder")
    if not bool(torch.isfinite(train.x).all()):
        raise RunError("the train split has features that are not finite: the encoder has diverged")
    return train.x.to(x)
