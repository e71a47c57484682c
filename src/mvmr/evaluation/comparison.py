"""Encoders side by side: differences between them on the same test images, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvmr.evaluation.intervals import paired_interval
from mvmr.types import Result


@dataclass(frozen=True)
class Comparison:
    """By how much one encoder is ahead of another, in the metric's unit."""

    evaluation: str
    data: str
    metric: str
    encoder: str
    against: str
    difference: float
    low: float
    high: float
    """Ends of the 95 % interval: images are resampled in pairs; 0 outside it means a difference."""

    @property
    def is_certain(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def compare(results: Sequence[Result], *, against: str | None = None) -> list[Comparison]:
    """Each encoder against one (by default that of the first result), in every metric with outcomes of both.

    The intervals are of each comparison by itself: of twenty at 95 % one is expected to miss. Of parts of a metric
    (top1/fog) none is made.
    """
    if not results:
        return []
    reference = against or results[0].encoder
    base = {(result.evaluation, result.data): result for result in results if result.encoder == reference}
    found = []
    for result in results:
        other = base.get((result.evaluation, result.data))
        if other is None or result.encoder == reference:
            continue
        for metric in (name for name in result.metrics if name in result.outcomes):
            if metric not in other.outcomes or "/" in metric or len(result.outcomes[metric]) < 2:
                continue
            interval = paired_interval(result.outcomes[metric], other.outcomes[metric])
            found.append(
                Comparison(
                    result.evaluation, result.data, metric, result.encoder, reference,
                    interval.value, interval.low, interval.high,
                )
            )  # fmt: skip
    return found
