"""Numbers that an evaluation gives, with what each test image contributed to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mvmr.evaluation.intervals import mean_interval, statistic_interval

RESAMPLES = 1000
"""Of a statistic that is no mean over images, such as mAP, and so is computed anew for each."""


class Metrics(dict[str, float]):
    """{name: number}, and for some of them what other test images would have changed.

    outcomes: {name: [M]}, whose mean is the number, one value a test image in the order of the split, but for images
    that the evaluation leaves out by their labels. statistics:
    {name: function of positions [n] in 0 ... images - 1}, for numbers that are no mean; of all positions in order it
    gives the number.
    """

    def __init__(
        self,
        values: Mapping[str, float],
        *,
        outcomes: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Callable[[Tensor], float]] | None = None,
        images: int = 0,
    ):
        super().__init__(values)
        self.outcomes = dict(outcomes or {})
        self.statistics = dict(statistics or {})
        self.images = images

    def also(self, **values: float) -> Metrics:
        """The same with further numbers."""
        return Metrics({**self, **values}, outcomes=self.outcomes, statistics=self.statistics, images=self.images)


def with_intervals(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers, and NAME_low and NAME_high beside each that has outcomes or is a statistic: 95 %, by bootstrap.

    Those of statistics, which are percentages, are centred (see `intervals.Kind`), and end at 0 and 100. Intervals that
    the evaluation made itself stay. Parts of a number (top1/fog) have none, nor has one test image.
    """
    found = dict(metrics)
    if not isinstance(metrics, Metrics):
        return found
    for name, outcome in metrics.outcomes.items():
        if "/" not in name and f"{name}_low" not in found and len(outcome) > 1:
            interval = mean_interval(outcome)
            found |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    for name, statistic in metrics.statistics.items():
        if f"{name}_low" not in found and metrics.images > 1:
            interval = statistic_interval(statistic, metrics.images, kind="centred", resamples=RESAMPLES)
            found |= {f"{name}_low": max(0.0, interval.low), f"{name}_high": min(100.0, interval.high)}
    return found
