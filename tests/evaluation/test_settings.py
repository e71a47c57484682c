"""Settings of evaluations: what has no effect is refused, and mistakes are told by their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvmr.errors import UserError
from mvmr.evaluation.settings import check_evaluations, checked_settings, settings_of


def test_given_settings_come_on_top_of_the_recipes() -> None:
    proposed = {"knn.k": 3, "linear_fast.l2": 10.0}
    assert checked_settings({"knn.k": 5}, proposed, ["knn"]) == {"knn.k": 5, "linear_fast.l2": 10.0}
    assert checked_settings({"knn": {}}, {}, ["knn"]) == {}
    assert settings_of("knn", {"knn.k": 5, "linear_fast.l2": 10.0}, folder=None).k == 5
    assert settings_of("head", {}, folder=Path("runs/a")).folder == Path("runs/a")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"linear_fast.l2": 3}, r"linear_fast\.l2: no effect, because linear_fast is not asked for; add it to --on"),
        (
            {"knn.k": 3, "linear.nonsense": 1, "linear.lr": 1},
            r"linear\.nonsense, linear\.lr: no effect, because lin",
        ),
        ({"k": 3}, r"k: settings are written EVALUATION\.key=value"),
        ({"knnn.k": 3}, r"knnn\.k: settings are written"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked_settings(given, {"knn.k": 1}, ["knn"])


@pytest.mark.parametrize(
    ("evaluation", "settings", "said"),
    [
        ("knn", {"knn.kk": 3}, r"^knn\.kk: Extra inputs .*known settings: k, temperature"),
        ("linear", {"linear.preset": "moco", "linear.momentum": 0.0, "linear.nesterov": True}, r"^linear: Value error"),
        ("knn", {"knn": 5}, r"^knn: Extra inputs"),
    ],
)
def test_mistakes_are_told_by_their_keys(evaluation: str, settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings_of(evaluation, settings, folder=None)


def test_unknown_evaluations() -> None:
    with pytest.raises(UserError, match="--on knnn: no such evaluation; known: "):
        check_evaluations(["knn", "knnn"])
