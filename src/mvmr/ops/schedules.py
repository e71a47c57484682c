"""Schedules as pure functions of the optimiser step: no counter, nothing to save or restore."""

from __future__ import annotations

import math
from collections.abc import Sequence


def linear(step: int, total_steps: int, start: float, end: float) -> float:
    """Value at `step` of a straight line from `start` at step 0 to exactly `end` at the last step, total_steps - 1.

    Steps outside the run take the value at its nearer end; a run of one step stays at `start`.
    Raises ValueError when `total_steps` is below 1.
    """
    return _between(start, end, _progress(step, total_steps))


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Value at `step` of a half cosine from `start` at step 0 to exactly `end` at the last step, total_steps - 1.

    start + (end - start) (1 - cos(pi progress)) / 2, with the progress, ends and errors of `linear`.
    """
    return _between(start, end, 0.5 * (1.0 - math.cos(math.pi * _progress(step, total_steps))))


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, final: float = 0.0, start: float = 0.0) -> float:
    """Multiplier of the peak rate: a line from `start` to 1 over the warm-up, then a half cosine to `final`.

    It is `start` at step 0, 1 at step `warmup_steps` (at step 0 without warm-up) and exactly `final` from the last
    step, total_steps - 1, on. All are optimiser steps, not batches: under accumulation or on several devices there
    are fewer of them, and a schedule as long as the number of batches would stop high on its curve. A warm-up that
    leaves the cosine no step is shortened to end one step before the last; a run of one step has multiplier 1.
    Raises ValueError when `total_steps` is below 1 or `warmup_steps` negative.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
    last = total_steps - 1
    warmup = min(warmup_steps, max(0, last - 1))
    if step < warmup:
        return linear(step, warmup + 1, start, 1.0)
    return cosine(step - warmup, total_steps - warmup, 1.0, final)


def warmup_steps_down(
    step: int, *, drops: Sequence[int], factor: float, warmup_steps: int, start: float = 0.0
) -> float:
    """Multiplier of the peak rate: a line from `start` to 1 over the warm-up, then `factor` once for every drop so far.

    drops: optimiser steps from which on the rate is multiplied by `factor` once more; none: a constant rate.
    Raises ValueError when `warmup_steps` is negative.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
    warm = linear(step, warmup_steps + 1, start, 1.0) if step < warmup_steps else 1.0
    return warm * factor ** sum(step >= drop for drop in drops)


def _progress(step: int, total_steps: int) -> float:
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; a run has at least one step")
    return min(max(step, 0) / (total_steps - 1), 1.0) if total_steps > 1 else 0.0


def _between(start: float, end: float, share: float) -> float:
    # Written so that both ends are exact: start + (end - start) * 1 may differ from `end` in its last bit.
    return start * (1.0 - share) + end * share
