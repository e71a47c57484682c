"""Average precision as a plain loop over its definition, in exact fractions; shares nothing with the package."""

from __future__ import annotations

import math
from fractions import Fraction


def by_definition(scores: list[float], labels: list[int], definition: str) -> float:
    """Precision and recall at every rank in exact fractions, then the definition in words, one step after another."""
    rows = [(score, label) for score, label in zip(scores, labels, strict=True) if label != -1]
    rows = sorted(rows, key=lambda row: -row[0])  # Python's sort keeps the order of equals
    positives = sum(label for _, label in rows)
    if positives == 0:
        return math.nan
    curve = []
    for rank in range(1, len(rows) + 1):
        hits = sum(label for _, label in rows[:rank])
        curve.append((Fraction(hits, positives), Fraction(hits, rank)))

    def interpolated(recall: Fraction) -> Fraction:
        return max(precision for reached, precision in curve if reached >= recall)

    if definition == "voc07":
        return float(sum(interpolated(Fraction(tenth, 10)) for tenth in range(11)) / 11)
    return float(sum(interpolated(Fraction(hit, positives)) for hit in range(1, positives + 1)) / positives)
