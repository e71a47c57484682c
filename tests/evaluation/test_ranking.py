"""Rankings against scipy's coefficients, by hand, and from what a run wrote."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import scipy.stats

from mvmr.evaluation.ranking import epochs_of, kendall, rank_checkpoints, spearman
from mvmr.types import UserError


@pytest.mark.parametrize("seed", range(8))
def test_coefficients_are_scipys(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(3, 25)
    x = [draw.gauss(0, 1) for _ in range(count)]
    y = [a + draw.gauss(0, 1) for a in x]
    if seed % 2:  # ties on both sides
        x, y = [float(round(a)) for a in x], [float(round(a)) for a in y]
    assert kendall(x, y) == pytest.approx(scipy.stats.kendalltau(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_coefficients_at_their_limits() -> None:
    rising = [1.0, 2.0, 5.0, 9.0]
    for coefficient in (kendall, spearman):
        assert coefficient(rising, [math.exp(a) for a in rising]) == pytest.approx(1)
        assert coefficient(rising, [-a for a in rising]) == pytest.approx(-1)
        assert coefficient(rising, [3.0] * 4) is None
        assert coefficient([-math.inf, *rising[1:]], rising) == pytest.approx(1)
        with pytest.raises(ValueError, match="shorter"):
            coefficient(rising, rising[:3])


SCORES = {
    "a": {"rankme": 10.0, "alpha": 0.5, "uniformity": -3.0, "dependence/hog": 0.2, "seconds": 1.0},
    "b": {"rankme": 30.0, "alpha": 1.1, "uniformity": -1.0, "dependence/hog": 0.3},
    "c": {"rankme": 20.0, "alpha": 3.0, "uniformity": -2.0, "dependence/hog": 0.1, "lidar": 5.0},
}
ACCURACIES = {"c": 50.0, "b": 70.0, "a": 60.0}  # in another order


def test_each_diagnostic_ranks_in_its_own_direction() -> None:
    found = rank_checkpoints(SCORES)
    assert {name: ranking.order for name, ranking in found.items()} == {
        "rankme": ("b", "c", "a"),
        "alpha": ("b", "a", "c"),  # 0.1, 0.5 and 2 from 1
        "uniformity": ("a", "c", "b"),
        "dependence/hog": ("b", "a", "c"),
    }
    assert all(ranking.tau is ranking.rho is ranking.cost is None for ranking in found.values())
    other = rank_checkpoints(SCORES, better={"rankme": "lower", "alpha": 3.0})
    assert {name: ranking.order for name, ranking in other.items()} == {
        "rankme": ("a", "c", "b"),
        "alpha": ("c", "b", "a"),
    }


def test_rankings_are_compared_with_the_probes() -> None:
    found = rank_checkpoints(SCORES, ACCURACIES)
    probe = [60.0, 70.0, 50.0]
    merits = {
        "rankme": [10.0, 30.0, 20.0], "alpha": [-0.5, -0.1, -2.0], "uniformity": [3.0, 1.0, 2.0],
        "dependence/hog": [0.2, 0.3, 0.1],
    }  # fmt: skip
    for name, merit in merits.items():
        assert found[name].tau == pytest.approx(scipy.stats.kendalltau(merit, probe).statistic)
        assert found[name].rho == pytest.approx(scipy.stats.spearmanr(merit, probe).statistic)
    assert found["alpha"].tau == pytest.approx(1)
    assert found["uniformity"].rho == pytest.approx(-0.5)
    assert {name: ranking.cost for name, ranking in found.items()} == {
        "rankme": 0.0, "alpha": 0.0, "uniformity": 10.0, "dependence/hog": 0.0,
    }  # fmt: skip
    assert rank_checkpoints(SCORES, ACCURACIES)["rankme"].order == rank_checkpoints(SCORES)["rankme"].order


def test_ties_and_what_is_not_finite() -> None:
    scores = {"x": {"rankme": math.nan}, "y": {"rankme": 2.0}, "z": {"rankme": 2.0}, "w": {"rankme": 3.0}}
    found = rank_checkpoints(scores, {"x": 10.0, "y": 20.0, "z": 20.0, "w": 30.0})["rankme"]
    assert found.order == ("w", "y", "z", "x")
    assert found.tau == pytest.approx(1)
    flat = rank_checkpoints(scores, dict.fromkeys(scores, 5.0))["rankme"]
    assert (flat.tau, flat.rho, flat.cost) == (None, None, 0.0)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="two checkpoints or more, and there are 1"):
        rank_checkpoints({"a": SCORES["a"]})
    with pytest.raises(UserError, match=r"accuracies: none for b, c;"):
        rank_checkpoints(SCORES, {"a": 1.0, "c": math.nan})
    with pytest.raises(UserError, match="no diagnostic in common that can be ranked: rankme, lidar"):
        rank_checkpoints({"a": {"rankme": 1.0}, "b": {"lidar": 1.0}})


def write(folder: Path, *records: dict[str, float]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_epochs_of_a_run(tmp_path: Path) -> None:
    run = write(
        tmp_path,
        {"step": 3, "epoch": 0, "train/loss": 4.0, "lr": 0.1},
        {"step": 5, "epoch": 0, "rankme": 2.0, "dependence/hog": 0.1},
        {"step": 50, "epoch": 9, "rankme": 4.0, "dependence/hog": 0.3, "knn/top1": 40.0, "knn/top5": 90.0},
        {"step": 100, "epoch": 19, "rankme": 3.0, "dependence/hog": 0.2, "knn/top1": 50.0, "head/top1": 60.0},
    )
    scores, accuracies = epochs_of(run)
    assert scores == {
        "epoch-0010": {"rankme": 4.0, "dependence/hog": 0.3}, "epoch-0020": {"rankme": 3.0, "dependence/hog": 0.2},
    }  # fmt: skip
    assert accuracies == {"epoch-0010": 40.0, "epoch-0020": 50.0}
    assert rank_checkpoints(scores, accuracies)["rankme"].tau == pytest.approx(-1)
    every, none = epochs_of(run, probe=None)
    assert list(every) == ["epoch-0001", "epoch-0010", "epoch-0020"]
    assert none is None
    assert rank_checkpoints(every)["rankme"].order == ("epoch-0010", "epoch-0020", "epoch-0001")
    with pytest.raises(UserError, match="no epoch has diagnostics and knn/top3; train with online"):
        epochs_of(run, probe="knn/top3")
    with pytest.raises(UserError, match=r"metrics.jsonl: there is none"):
        epochs_of(tmp_path / "nowhere")
