from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvmr.ops.schedules import cosine, linear, warmup_cosine, warmup_steps_down


def curve(total_steps: int, warmup_steps: int, *, start: float = 0.0, final: float = 0.0) -> list[float]:
    return [
        warmup_cosine(step, total_steps=total_steps, warmup_steps=warmup_steps, start=start, final=final)
        for step in range(total_steps)
    ]


def test_warmup_cosine_equals_the_closed_form_written_out() -> None:
    total, warmup, start, final = 101, 20, 0.01, 0.05
    for step, value in enumerate(curve(total, warmup, start=start, final=final)):
        if step <= warmup:
            expected = start + (1 - start) * step / 20
        else:
            expected = final + (1 - final) * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert value == pytest.approx(expected, abs=1e-14)


def test_warmup_cosine_is_exact_at_its_three_corners() -> None:
    values = curve(1000, 100, start=0.01, final=0.001)
    assert values[0] == 0.01
    assert values[100] == 1.0
    assert values[-1] == 0.001
    assert warmup_cosine(549, total_steps=999, warmup_steps=100) == pytest.approx(0.5)  # halfway down
    assert curve(1000, 0, final=0.001)[0] == 1.0


def test_warmup_cosine_rises_then_falls() -> None:
    values = curve(300, 50, start=0.1, final=0.2)
    rises = [b > a for a, b in pairwise(values)]
    assert rises == [True] * 50 + [False] * 249


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 800),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_warmup_cosine_stays_in_range_and_ends_at_final_for_any_lengths(
    total: int, warmup: int, start: float, final: float
) -> None:
    values = curve(total, warmup, start=start, final=final)
    assert all(min(start, final) - 1e-12 <= value <= 1 + 1e-12 for value in values)
    assert max(values) == 1.0
    if total > 1:
        assert values[-1] == final


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (1, 0, [1.0]),
        (1, 5, [1.0]),
        (2, 0, [1.0, 0.0]),
        (2, 2, [1.0, 0.0]),
        (3, 3, [0.0, 1.0, 0.0]),
        (4, 9, [0.0, 0.5, 1.0, 0.0]),  # too long a warm-up leaves the last step to the cosine
    ],
)
def test_warmup_cosine_of_very_short_runs(total: int, warmup: int, expected: list[float]) -> None:
    assert curve(total, warmup) == pytest.approx(expected, abs=1e-15)


def test_steps_outside_the_run_take_the_nearer_end() -> None:
    # A scheduler asks for the step after the last one once the last update is done.
    assert warmup_cosine(500, total_steps=100, warmup_steps=10, final=0.03) == 0.03
    assert linear(-3, 10, 2.0, 5.0) == 2.0
    assert cosine(99, 10, 0.996, 1.0) == 1.0


@pytest.mark.parametrize("schedule", [linear, cosine])
@given(start=st.floats(-10, 10), end=st.floats(-10, 10), total=st.integers(2, 300))
def test_linear_and_cosine_are_exact_at_both_ends(schedule, start: float, end: float, total: int) -> None:
    assert schedule(0, total, start, end) == start
    assert schedule(total - 1, total, start, end) == end
    assert schedule(0, 1, start, end) == start


def test_linear_and_cosine_equal_their_formulas() -> None:
    # BYOL's momentum: 1 - (1 - 0.99) (cos(pi k / K) + 1) / 2.
    for step in range(51):
        assert cosine(step, 51, 0.99, 1.0) == pytest.approx(1 - 0.01 * (math.cos(math.pi * step / 50) + 1) / 2)
        assert linear(step, 51, 0.04, 0.07) == pytest.approx(0.04 + 0.03 * step / 50)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="total_steps is 0"):
        warmup_cosine(0, total_steps=0, warmup_steps=0)
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        warmup_cosine(0, total_steps=10, warmup_steps=-1)
    with pytest.raises(ValueError, match="total_steps is -2"):
        linear(0, -2, 0.0, 1.0)


def test_steps_down_after_a_warmup() -> None:
    values = [warmup_steps_down(s, drops=[6, 8], factor=0.1, warmup_steps=2, start=0.5) for s in range(10)]
    assert values == pytest.approx([0.5, 0.75, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)
    assert [warmup_steps_down(s, drops=[], factor=0.1, warmup_steps=0) for s in range(3)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        warmup_steps_down(0, drops=[], factor=0.1, warmup_steps=-1)
