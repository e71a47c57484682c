"""Average precision against a plain loop from the definition, other packages, and what must hold for any ranking."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

from evaluation.plain_precision import by_definition
from mvmr.evaluation.average_precision import average_precision
from mvmr.types import RunError, UserError

DEFINITIONS = ["voc07", "all"]


def drawn(seed: int, count: int = 60, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, (count, classes), generator=generator).to(torch.int8)
    scores = torch.randn(count, classes, generator=generator) + 0.5 * labels
    return scores, labels


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_class_agrees_with_the_definition(definition: str) -> None:
    for seed in range(5):
        scores, labels = drawn(seed)
        expected = [by_definition(s, y, definition) for s, y in zip(scores.T.tolist(), labels.T.tolist(), strict=True)]
        found = average_precision(scores, labels, definition=definition)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        alone = average_precision(scores[:, 3], labels[:, 3], definition=definition)
        assert alone.item() == pytest.approx(expected[3], abs=1e-12)


RANKINGS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-1, 1)), min_size=1, max_size=30)


@given(rows=RANKINGS)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_ties_and_labels_left_out_agree_with_the_definition(rows: list[tuple[int, int]], definition: str) -> None:
    scores, labels = [float(score) for score, _ in rows], [label for _, label in rows]
    found = average_precision(torch.tensor(scores), torch.tensor(labels), definition=definition).item()
    assert found == pytest.approx(by_definition(scores, labels, definition), abs=1e-12, nan_ok=True)


def test_two_rankings_by_hand() -> None:
    labels = torch.tensor([1, 0, 1, 0])  # precision 1 to recall 1/2, then 2/3: recalls 0 to 0.5 are six of eleven
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert average_precision(scores, labels).item() == pytest.approx((6 + 5 * 2 / 3) / 11, abs=1e-12)
    assert average_precision(scores, labels, definition="all").item() == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)
    # Precision 1/2 at the first hit, 2/3 at the second: interpolation lifts the first.
    labels = torch.tensor([0, 1, 1])
    assert average_precision(scores[:3], labels).item() == pytest.approx(2 / 3, abs=1e-12)
    assert average_precision(scores[:3], labels, definition="all").item() == pytest.approx(2 / 3, abs=1e-12)
    assert average_precision_score(labels, scores[:3]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_recall_of_three_tenths_is_reached_exactly() -> None:
    """Hits at ranks 1, 2, 3 of ten positives, the others at the end: p is 1 up to 0.3, in floats 0.3 < 3 * 0.1."""
    labels = torch.tensor([1] * 3 + [0] * 90 + [1] * 7)
    scores = torch.arange(100.0).flip(0)
    rest = [Fraction(10, 100)] * 7  # the precision rises to the end, so its last value is the largest beyond 0.3
    assert average_precision(scores, labels).item() == pytest.approx(float((4 + sum(rest)) / 11), abs=1e-12)


def test_all_recalls_is_scikit_learns_value_where_interpolation_changes_nothing() -> None:
    """scikit-learn sums precision at each hit without its envelope: equal if precision falls from hit to hit."""
    generator = torch.Generator().manual_seed(3)
    compared = 0
    for _ in range(300):
        labels = (torch.rand(14, generator=generator) < torch.linspace(0.9, 0.05, 14)).long()
        scores = torch.linspace(1.0, 0.0, 14)
        at_hits = [labels[: rank + 1].double().mean().item() for rank in range(14) if labels[rank]]
        reference = average_precision_score(labels, scores) if labels.any() else math.nan
        found = average_precision(scores, labels, definition="all").item()
        if at_hits and at_hits == sorted(at_hits, reverse=True):
            compared += 1
            assert found == pytest.approx(reference, abs=1e-12)
        elif at_hits:
            assert found > reference
    assert 20 < compared < 280


def test_scikit_learns_value_of_the_interpolated_curve() -> None:
    """The area under the envelope, from scikit-learn's own precision-recall curve of scores without ties."""
    from sklearn.metrics import precision_recall_curve

    for seed in range(5):
        scores, labels = drawn(seed, classes=1)
        kept = labels[:, 0] >= 0
        precision, recall, _ = precision_recall_curve(labels[kept, 0], scores[kept, 0])  # recall falls
        envelope = [max(precision[: i + 1]) for i in range(len(precision))]
        area = sum((recall[i] - recall[i + 1]) * envelope[i] for i in range(len(recall) - 1))
        assert average_precision(scores, labels, definition="all").item() == pytest.approx(area, abs=1e-12)


LABELS = st.lists(st.integers(-1, 1), min_size=1, max_size=40).filter(lambda labels: 1 in labels)


@given(labels=LABELS)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_perfect_ranking_is_one_and_the_worst_is_not(labels: list[int], definition: str) -> None:
    y = torch.tensor(labels)
    scores = y + torch.linspace(0.0, 0.5, len(labels))
    assert average_precision(scores, y, definition=definition).item() == 1.0
    if 0 in labels:
        assert average_precision(-scores, y, definition=definition).item() < 1.0


@given(labels=LABELS, seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_only_the_order_counts(labels: list[int], seed: int, definition: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    y, scores = torch.tensor(labels), torch.randperm(len(labels), generator=generator).double()
    value = pytest.approx(average_precision(scores, y, definition=definition).item(), abs=1e-12)
    order = torch.randperm(len(labels), generator=generator)
    assert average_precision(scores[order], y[order], definition=definition).item() == value
    assert average_precision(torch.exp(0.3 * scores) - 7, y, definition=definition).item() == value
    assert average_precision(scores[y >= 0], y[y >= 0], definition=definition).item() == value


def test_equal_scores_stay_in_their_order() -> None:
    first, last = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    for definition in DEFINITIONS:
        assert average_precision(torch.zeros(4), first, definition=definition) == 1.0
        assert average_precision(torch.zeros(4), last, definition=definition) == 0.25


def test_a_class_that_nobody_shows_has_no_value() -> None:
    for labels in ([0, 0, -1], [-1, -1, -1], []):
        value = average_precision(torch.arange(float(len(labels))), torch.tensor(labels, dtype=torch.int8))
        assert math.isnan(value.item())
    assert average_precision(torch.empty(0, 4), torch.empty(0, 4)).shape == (4,)


def test_wrong_input() -> None:
    with pytest.raises(UserError, match=r"\[3\] and labels \[4\]"):
        average_precision(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UserError, match=r"\[1, 1, 1\]"):
        average_precision(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(UserError, match=r"1 \(present\)"):
        average_precision(torch.zeros(3), torch.tensor([0, 1, 2]))
    with pytest.raises(RunError, match="NaN"):
        average_precision(torch.tensor([0.0, math.nan]), torch.tensor([0, 1]))
    assert average_precision(torch.tensor([math.inf, -math.inf]), torch.tensor([1, 0])) == 1.0
