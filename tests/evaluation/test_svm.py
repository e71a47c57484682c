"""Support vector machines against their objective, their choice of costs against a grid search, and the ROC's area."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor

from evaluation.several_labels import NAMES, some_features
from mvmr.evaluation.measured import with_intervals
from mvmr.evaluation.multilabel import MultilabelConfig, multilabel
from mvmr.evaluation.roc import roc_auc
from mvmr.evaluation.svm import COSTS, svm_classes, unit_length
from mvmr.types import Features, RunError, UserError

# --- the machines ---------------------------------------------------------------------------------------------------


def objective(point: Tensor, x: Tensor, y: Tensor, cost: float, heavier: float) -> Tensor:
    """Of one class, image by image, as the docstring has it; point [D + 1]."""
    value = 0.5 * (point**2).sum()
    for row, label in zip(x, y.tolist(), strict=True):
        if label >= 0:
            hinge = (1 - (1 if label else -1) * (row @ point[:-1] + point[-1])).clamp_min(0)
            value = value + cost * (heavier if label else 1.0) * hinge**2
    return value


@pytest.mark.parametrize("cost", [1e-3, 0.1, 10.0])
def test_the_objective_has_no_slope_where_it_ends(cost: float) -> None:
    train, _ = some_features(count=60)
    assert train.y is not None
    x = unit_length(train.x)
    weight, bias, chosen = svm_classes(x, train.y, NAMES, costs=(cost,), positive_weight=3.0)
    assert chosen.tolist() == [cost] * len(NAMES)
    for number in range(len(NAMES)):
        found = torch.cat([weight[number], bias[number : number + 1]])
        slopes = []
        for point in (found, torch.zeros_like(found)):
            at = point.clone().requires_grad_()
            objective(at, x, train.y[:, number], cost, 3.0).backward()
            assert at.grad is not None
            slopes.append(at.grad.norm().item())
        assert slopes[0] < 1e-3 * slopes[1]


def test_images_written_twice_count_twice() -> None:
    """Also where there are more dimensions than images at first."""
    train, _ = some_features(count=15, unknown=0.0)
    assert train.y is not None
    x, y = unit_length(train.x), train.y[:, :1].clone()
    few = svm_classes(x, y, NAMES[:1], costs=(1.0,))
    many = svm_classes(torch.cat([x, x]), torch.cat([y, y]), NAMES[:1], costs=(0.5,))
    torch.testing.assert_close(few[0], many[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(few[1], many[1], rtol=0, atol=2e-3)


def test_each_classes_cost_is_a_grid_searchs() -> None:
    train, _ = some_features(count=150)
    assert train.y is not None
    x, costs = unit_length(train.x), (1e-4, 1e-2, 0.3, 3.0, 30.0)
    weight, bias, chosen = svm_classes(x, train.y, NAMES, costs=costs[::-1], folds=4)
    for number in range(len(NAMES)):
        known = (train.y[:, number] >= 0).numpy()
        search = GridSearchCV(
            LinearSVC(class_weight={1: 2}, dual=False), {"C": costs}, scoring="average_precision", cv=StratifiedKFold(4)
        ).fit(x.numpy()[known], train.y[:, number].numpy()[known])
        assert chosen[number] == search.best_params_["C"]
        np.testing.assert_allclose(weight[number], search.best_estimator_.coef_[0], rtol=1e-6)
        np.testing.assert_allclose(bias[number], search.best_estimator_.intercept_[0], rtol=1e-6)
    assert len(set(chosen.tolist())) > 1


def test_costs_are_those_of_the_released_code() -> None:
    assert len(COSTS) == 26
    assert (min(COSTS), max(COSTS)) == (1e-7, 100.0)
    assert {0.0625, 0.5**19} < set(COSTS)
    assert list(COSTS) == sorted(COSTS)


def test_one_image_with_a_class_chooses_no_cost_and_two_choose_by_two() -> None:
    train, _ = some_features(count=40, unknown=0.0)
    assert train.y is not None
    y = train.y.clone()
    y[:, 0], y[:, 1] = 0, 0
    y[3, 0] = y[5, 1] = y[7, 1] = 1
    with pytest.warns(UserWarning, match=r"its cost is 1, not chosen: ant$"):
        _, _, chosen = svm_classes(unit_length(train.x), y, NAMES, costs=(0.01, 100.0))
    assert chosen[0] == 1.0
    assert set(chosen[1:].tolist()) <= {0.01, 100.0}


def test_a_search_cut_short_says_so() -> None:
    train, _ = some_features()
    assert train.y is not None
    with pytest.warns(
        UserWarning, match=r"short of its optimum for ant, bee, cat, dog; raise multilabel\.max_iterations"
    ):
        svm_classes(unit_length(train.x), train.y, NAMES, costs=(100.0,), max_iterations=1)


# --- the evaluation -------------------------------------------------------------------------------------------------


def test_it_measures_what_the_machines_say() -> None:
    train, test = some_features()
    assert train.y is not None
    assert test.y is not None
    config = MultilabelConfig(solver="svm", costs=(0.01, 1.0))
    metrics = multilabel(train, test, config)
    weight, bias, chosen = svm_classes(unit_length(train.x), train.y.clamp_min(0), NAMES, costs=(0.01, 1.0))
    scores = unit_length(test.x) @ weight.T + bias
    areas = [
        roc_auc_score(test.y[known, number], scores[known, number])
        for number, known in enumerate((test.y >= 0).T)
    ]  # fmt: skip
    assert metrics["auc"] == pytest.approx(100 * np.mean(areas), abs=1e-9)
    assert [metrics[f"cost/{name}"] for name in NAMES] == chosen.tolist()
    assert metrics["map"] > 20 + 100 * float((test.y == 1).float().mean())
    for name in ("map", "map11", "auc"):
        ends = with_intervals(metrics)
        assert ends[f"{name}_low"] < metrics[name] < ends[f"{name}_high"]


def test_unknown_labels_train_as_absent_by_default_and_can_be_left_out() -> None:
    train, test = some_features(unknown=0.3)
    by = {
        unknown: multilabel(train, test, MultilabelConfig(solver="svm", costs=(1.0,), unknown=unknown))
        for unknown in (None, "absent", "left_out")
    }
    assert by[None] == by["absent"] != by["left_out"]
    fast = {unknown: multilabel(train, test, MultilabelConfig(l2=10.0, unknown=unknown)) for unknown in by}
    assert fast[None] == fast["left_out"] != fast["absent"]


def test_the_length_of_features_does_not_matter() -> None:
    train, test = some_features()
    config = MultilabelConfig(solver="svm", costs=(0.1,))
    longer = [Features(100 * part.x, part.y, NAMES) for part in (train, test)]
    assert multilabel(*longer, config)["map"] == pytest.approx(multilabel(train, test, config)["map"], abs=0.2)


# --- area under the ROC ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([-1, 0, 1])), min_size=2, max_size=40).filter(
        lambda rows: {0, 1} <= {label for _, label in rows}
    )
)
def test_it_counts_pairs(rows: list[tuple[int, int]]) -> None:
    scores, labels = torch.tensor(rows).T
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, of_a in rows for b, of_b in rows if (of_a, of_b) == (1, 0)]
    found = roc_auc(scores.float(), labels).item()
    assert found == pytest.approx(np.mean(pairs), abs=1e-12)
    known = labels >= 0
    assert found == pytest.approx(roc_auc_score(labels[known], scores[known]), abs=1e-9)


def test_classes_stand_alone_and_one_without_pairs_has_none() -> None:
    scores, labels = torch.randn(50, 3), torch.randint(-1, 2, (50, 3))
    labels[:, 1] = labels[:, 1].abs()
    labels[:, 2] = 1
    found = roc_auc(scores, labels)
    assert found[:2].tolist() == [roc_auc(scores[:, k], labels[:, k]).item() for k in (0, 1)]
    assert found[2].isnan()
    with pytest.raises(UserError, match=r"must both be \[N\] or \[N, C\]"):
        roc_auc(scores, labels[:, 0])
    with pytest.raises(RunError, match="NaN"):
        roc_auc(torch.tensor([0.0, float("nan")]), torch.tensor([0, 1]))


def test_no_area_where_every_test_image_shows_the_class() -> None:
    train, test = some_features(unknown=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = multilabel(train, Features(test.x, torch.ones_like(test.y), NAMES), MultilabelConfig(l2=10.0))  # type: ignore[arg-type]
    assert "auc" not in metrics
