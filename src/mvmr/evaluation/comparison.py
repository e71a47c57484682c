"""Encoders side by side: differences between them on the same test images, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvmr.errors import UserError, nearest
from mvmr.evaluation.intervals import Interval, paired_interval, statistic_interval
from mvmr.evaluation.measured import RESAMPLES
from mvmr.types import Result

FOLDER = "folder"
"""The setting that differs with the encoder: where what was trained for it lies."""


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
    """Each encoder against one (by default that of the first result), in every metric that both know image by image.

    The intervals are of each comparison by itself: of twenty at 95 % one is expected to miss. Of parts of a metric
    (top1/fog) none is made, nor of mAP and its like where a result was read from its file. Raises UserError for an
    unknown name, for two results of one name, and where two encoders were evaluated under different settings.
    """
    if not results:
        return []
    reference = results[0].encoder if against is None else against
    names = list(dict.fromkeys(result.encoder for result in results))
    if reference not in names:
        raise UserError(f"no encoder is called {reference}{nearest(reference, names)}; there are {', '.join(names)}")
    _refuse_twice(results)
    base = {(result.evaluation, result.data): result for result in results if result.encoder == reference}
    found = []
    for result in results:
        other = base.get((result.evaluation, result.data))
        if other is None or result.encoder == reference:
            continue
        _refuse_other_settings(result, other)
        for metric in (name for name in result.metrics if "/" not in name):
            interval = _difference(result, other, metric)
            if interval is not None:
                place = (result.evaluation, result.data, metric, result.encoder, reference)
                found.append(Comparison(*place, interval.value, interval.low, interval.high))
    return found


def _refuse_twice(results: Sequence[Result]) -> None:
    known = set()
    for result in results:
        place = (result.encoder, result.evaluation, result.data)
        if place in known:
            raise UserError(
                f"two results of {result.evaluation} on {result.data} are of an encoder called {result.encoder}, and "
                "could not be told apart; evaluate both in one call, which gives them different names"
            )
        known.add(place)


def _refuse_other_settings(first: Result, second: Result) -> None:
    keys = first.settings.keys() | second.settings.keys()
    other = sorted(key for key in keys - {FOLDER} if first.settings.get(key) != second.settings.get(key))
    if other:
        raise UserError(
            f"{first.evaluation} was made with different settings of {', '.join(other)} for {first.encoder} and "
            f"{second.encoder}; evaluate both with the same"
        )


def _difference(first: Result, second: Result, metric: str) -> Interval | None:
    """First - second on the same images, or None where one of them does not know what each image gave."""
    if metric in first.outcomes and metric in second.outcomes:
        return (
            None
            if len(first.outcomes[metric]) < 2
            else paired_interval(first.outcomes[metric], second.outcomes[metric])
        )
    if metric not in first.statistics or metric not in second.statistics or first.images != second.images:
        return None
    one, other = first.statistics[metric], second.statistics[metric]
    return statistic_interval(
        lambda chosen: one(chosen) - other(chosen), first.images, kind="centred", resamples=RESAMPLES
    )
