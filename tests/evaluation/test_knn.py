from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mvmr.evaluation import knn as module
from mvmr.evaluation.knn import KNNConfig, knn, nearest, votes
from mvmr.types import Features, UserError


def random_split(classes: int = 7) -> tuple[Features, Features]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 12, generator=generator, dtype=torch.float64)
    parts = []
    for count in (150, 60):
        y = torch.randint(0, classes, (count,), generator=generator)
        parts.append(Features(centres[y] + 1.5 * torch.randn(count, 12, generator=generator, dtype=torch.float64), y))
    return parts[0], parts[1]


def digits_split() -> tuple[Features, Features]:
    digits = load_digits()
    x, y = torch.tensor(digits.data), torch.tensor(digits.target)
    return Features(x[:1200], y[:1200]), Features(x[1200:], y[1200:])


def slow_scores(train: Features, test: Features, k: int, temperature: float, classes: int) -> list[list[float]]:
    """The definition, one pair at a time."""
    scores = []
    for query in test.x.tolist():
        length = math.sqrt(sum(a * a for a in query))
        cosines = []
        for j, row in enumerate(train.x.tolist()):
            product = sum(a * b for a, b in zip(query, row, strict=True))
            cosines.append((-product / (length * math.sqrt(sum(b * b for b in row))), j))
        score = [0.0] * classes
        for negative, j in sorted(cosines)[:k]:
            score[int(train.y[j])] += math.exp(-negative / temperature)
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_against_a_slow_loop(k: int, temperature: float) -> None:
    train, test = random_split()
    slow = torch.tensor(slow_scores(train, test, k, temperature, 7), dtype=torch.float64)
    fast = votes(train.x, train.y, test.x, KNNConfig(k=k, temperature=temperature), classes=7)
    # The same up to a factor a row, and -1 for classes without a vote.
    relative = torch.where(fast < 0, 0.0, fast)
    torch.testing.assert_close(relative / relative.sum(1, keepdim=True), slow / slow.sum(1, keepdim=True))
    assert torch.equal(fast < 0, slow == 0)
    top5 = [sorted(range(7), key=lambda c, row=row: (-row[c], c))[:5] for row in fast.tolist()]
    expected = 100 * np.mean([int(label) in five for label, five in zip(test.y, top5, strict=True)])
    metrics = knn(train, test, KNNConfig(k=k, temperature=temperature))
    assert metrics["top5"] == pytest.approx(expected)


@pytest.mark.parametrize("split", [random_split, digits_split])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 1.0)])
def test_against_scikit_learn(split, k: int, temperature: float) -> None:
    train, test = split()
    classifier = KNeighborsClassifier(
        k, weights=lambda distance: np.exp((1 - distance) / temperature), metric="cosine", algorithm="brute"
    )
    predicted = classifier.fit(train.x.numpy(), train.y.numpy()).predict(test.x.numpy())
    classes = int(train.y.max()) + 1
    scores = votes(train.x, train.y, test.x, KNNConfig(k=k, temperature=temperature), classes=classes)
    assert scores.argmax(1).tolist() == predicted.tolist()
    metrics = knn(train, test, KNNConfig(k=k, temperature=temperature))
    assert metrics["top1"] == pytest.approx(100 * (predicted == test.y.numpy()).mean())
    single = knn(
        Features(train.x.float(), train.y), Features(test.x.float(), test.y), KNNConfig(k=k, temperature=temperature)
    )
    assert single["top1"] == pytest.approx(metrics["top1"], abs=0.2)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits_split()
    whole = votes(train.x, train.y, test.x, KNNConfig(), classes=10)
    monkeypatch.setattr(module, "BLOCK", 7 * len(train.x))
    largest = 0

    def watched(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal largest
        largest = max(largest, similarity.numel())
        return nearest(similarity, k)

    monkeypatch.setattr(module, "nearest", watched)
    torch.testing.assert_close(votes(train.x, train.y, test.x, KNNConfig(), classes=10), whole)
    assert largest == 7 * len(train.x)


def test_more_neighbours_than_images_are_all_images() -> None:
    train, test = random_split()
    assert knn(train, test, KNNConfig(k=10_000)) == knn(train, test, KNNConfig(k=150))


def test_ties_go_to_the_earlier_image_and_the_lower_class() -> None:
    values, columns = nearest(torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]]), 3)
    assert columns.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert values.tolist() == [[3.0, 2.0, 2.0], [5.0, 5.0, 5.0]]
    # Four equal images: k = 1 takes the first, k = 2 splits the vote and takes the lower class.
    x, query = torch.ones(4, 2), Features(torch.ones(1, 2), torch.tensor([2]))
    train = Features(x, torch.tensor([2, 1, 1, 0]))
    assert knn(train, query, KNNConfig(k=1))["top1"] == 100.0
    assert votes(x, train.y, query.x, KNNConfig(k=2), classes=3).argmax().item() == 1


def test_ties_agree_with_a_stable_sort() -> None:
    similarity = torch.randint(0, 4, (200, 40), generator=torch.Generator().manual_seed(0)).float()
    values, columns = nearest(similarity, 9)
    expected = similarity.sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, expected.indices[:, :9])
    assert torch.equal(values, expected.values[:, :9])


def test_a_class_without_votes_does_not_count_among_the_five() -> None:
    x = torch.eye(8)
    train, test = Features(x, torch.arange(8)), Features(x[:1], torch.tensor([1]))
    assert knn(train, test, KNNConfig(k=1)) == {"top1": 0.0, "top5": 100.0}  # second of 8: no vote, lowest class
    late = Features(x[:1], torch.tensor([7]))
    assert knn(train, late, KNNConfig(k=1)) == {"top1": 0.0, "top5": 0.0}


def test_low_temperatures_do_not_overflow() -> None:
    train, test = digits_split()
    cold = knn(Features(train.x.float(), train.y), Features(test.x.float(), test.y), KNNConfig(temperature=1e-4))
    nearest_one = knn(train, test, KNNConfig(k=1))
    assert cold["top1"] == pytest.approx(nearest_one["top1"], abs=1e-9)


def test_labels_are_needed() -> None:
    train, test = random_split()
    with pytest.raises(UserError, match="train split has no labels"):
        knn(Features(train.x), test, KNNConfig())
