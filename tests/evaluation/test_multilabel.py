"""Multi-label classification against scikit-learn, its mean average precision against a plain computation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import log_loss
from torch.nn import functional

from evaluation.plain_precision import by_definition
from evaluation.scikit_scores import scikit_scores
from evaluation.several_labels import NAMES, some_features
from mvmr.evaluation.average_precision import average_precision
from mvmr.evaluation.knn import KNNConfig, knn
from mvmr.evaluation.linear import LinearConfig, LinearFastConfig, linear, linear_fast
from mvmr.evaluation.multilabel import L2_GRID, MultilabelConfig, adam_classes, multilabel, one_vs_rest
from mvmr.evaluation.regularisation import standardisation
from mvmr.evaluation.svm import COSTS
from mvmr.ops.random import permutation
from mvmr.types import Features, RunError, UserError

# --- the optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strengths", [(100.0,), (1.0,), (1e4, 100.0, 1.0, 0.1)])
def test_fast_is_scikit_learns_optimum_for_every_class(strengths: tuple[float, ...]) -> None:
    train, test = some_features()
    assert train.y is not None
    shift, scale = standardisation(train.x.double())
    x, x_test = (train.x.double() - shift) * scale, (test.x.double() - shift) * scale
    solved = list(one_vs_rest(x, train.y, strengths))
    assert len(solved) == len(strengths)
    for l2, (weight, bias) in zip(strengths, solved, strict=True):
        expected = torch.tensor(scikit_scores(train.x.numpy(), train.y.numpy(), test.x.numpy(), l2))
        torch.testing.assert_close(functional.linear(x_test, weight, bias), expected, rtol=0, atol=1e-3)


def test_more_dimensions_than_images_and_constant_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 90, generator=generator)
    x[:, 5] = 2.0
    y = (x[:, :3] > 0.3).to(torch.int8)
    shift, scale = standardisation(x.double())
    ((weight, bias),) = one_vs_rest((x.double() - shift) * scale, y, (3.0,))
    found = functional.linear((x.double() - shift) * scale, weight, bias)
    torch.testing.assert_close(
        found, torch.tensor(scikit_scores(x.numpy(), y.numpy(), x.numpy(), 3.0)), rtol=0, atol=1e-3
    )


def test_a_solver_cut_short_says_so() -> None:
    train, test = some_features()
    with pytest.warns(UserWarning, match=r"stopped short.*multilabel\.max_iterations"):
        multilabel(train, test, MultilabelConfig(l2=1e-3, max_iterations=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multilabel(train, test, MultilabelConfig(l2=1e-3))


def test_shift_and_scale_of_features_change_nothing() -> None:
    train, test = some_features()
    factor, offset = torch.logspace(-2, 2, 24), torch.linspace(-5, 5, 24)
    moved = [Features(part.x.double() * factor + offset, part.y, NAMES) for part in (train, test)]
    found, before = multilabel(*moved, MultilabelConfig()), multilabel(train, test, MultilabelConfig())
    assert found == pytest.approx(before, abs=1e-9)


# --- the choice of l2 -----------------------------------------------------------------------------------------------


def test_l2_is_the_best_on_a_held_out_fifth_of_the_training_images() -> None:
    chosen = set()
    for seed, (count, noise) in enumerate([(60, 0.3), (60, 3.0), (300, 1.0), (300, 0.05)]):
        train, test = some_features(seed, count=count, noise=noise)
        assert train.y is not None
        order = permutation(seed, 0, count)
        held, rest = order[: count // 5], order[count // 5 :]
        values = {}
        for l2 in L2_GRID:
            scores = scikit_scores(train.x[rest].numpy(), train.y[rest].numpy(), train.x[held].numpy(), l2)
            rows = zip(scores.T.tolist(), train.y[held].T.tolist(), strict=True)
            values[l2] = float(np.nanmean([by_definition(s, y, "all") for s, y in rows]))
        best = max(l2 for l2, value in values.items() if value > max(values.values()) - 1e-12)
        metrics = multilabel(train, test, MultilabelConfig(seed=seed))
        assert metrics["l2"] == best
        assert metrics == pytest.approx(multilabel(train, test, MultilabelConfig(l2=best)), abs=1e-9)
        chosen.add(best)
    assert len(chosen) > 1


def test_the_test_split_chooses_nothing() -> None:
    train, test = some_features(noise=3.0)
    other = Features(torch.rand_like(test.x), test.y, NAMES)
    config = MultilabelConfig()
    assert multilabel(train, test, config)["l2"] == multilabel(train, other, config)["l2"]


# --- adam -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers_protocol() -> None:
    assert MultilabelConfig().model_dump() == {
        "solver": "fast", "l2": None, "costs": COSTS, "folds": 3, "positive_weight": 2.0, "unknown": None,
        "max_iterations": 2000, "lr": 1e-4, "batch_size": 256, "epochs": 100, "seed": 0,
    }  # fmt: skip


def test_adam_is_adam_from_zero_on_the_known_labels() -> None:
    """Kingma and Ba, algorithm 1, written out, on the gradient of binary cross-entropy."""
    train, _ = some_features(count=110)
    assert train.y is not None
    x = train.x.double()
    weight, bias = adam_classes(x, train.y, MultilabelConfig(lr=1e-2, epochs=3, batch_size=50, seed=4))
    extended = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)  # the bias as one more column
    theta = torch.zeros(4, 25, dtype=torch.float64)
    first, second, t = torch.zeros_like(theta), torch.zeros_like(theta), 0
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        for chosen in torch.randperm(110, generator=generator).split(50):
            known = (train.y[chosen] != -1).double()
            error = known * (torch.sigmoid(extended[chosen] @ theta.T) - (train.y[chosen] == 1).double())
            gradient, t = error.T @ extended[chosen] / known.sum(), t + 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            theta = theta - 1e-2 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    assert t == 9  # 110 = 2 * 50 + 10: the last, smaller batch counts
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), theta)


def test_adam_learns_and_depends_on_its_seed_alone() -> None:
    train, test = some_features()
    with torch.no_grad():
        config = MultilabelConfig(solver="adam", lr=1e-2, epochs=20, seed=1)
        torch.manual_seed(0)
        metrics = multilabel(train, test, config)
        torch.manual_seed(1)
        assert multilabel(train, test, config) == metrics
    assert "l2" not in metrics
    assert metrics["loss_last"] < 0.9 * metrics["loss_first"] == pytest.approx(0.9 * math.log(2))
    chance = 100 * float(np.mean([(test.y[:, i] == 1).sum() / (test.y[:, i] >= 0).sum() for i in range(4)]))
    assert metrics["map"] > 1.5 * chance
    with torch.no_grad():
        assert multilabel(train, test, MultilabelConfig(l2=10.0))["map"] > 1.5 * chance


# --- metrics and mistakes -------------------------------------------------------------------------------------------


def test_labels_left_out_count_nowhere() -> None:
    train, test = some_features()
    assert test.y is not None
    metrics = multilabel(train, test, MultilabelConfig(l2=10.0))
    named = ("map11", "map", "auc", "n_train", "l2", "loss_first", "loss_last", *(f"ap11/{name}" for name in NAMES))
    assert set(metrics) == set(named)
    assert metrics["n_train"] == 300.0
    known = train.y.numpy() >= 0
    trained = scikit_scores(train.x.numpy(), train.y.numpy(), train.x.numpy(), 10.0)
    assert metrics["loss_last"] == pytest.approx(log_loss(train.y.numpy()[known], expit(trained)[known]), abs=1e-5)
    rates = np.nanmean(np.where(known, train.y.numpy(), np.nan), axis=0)
    assert metrics["loss_first"] == pytest.approx(
        log_loss(train.y.numpy()[known], np.broadcast_to(rates, known.shape)[known]), abs=1e-6
    )
    scores = scikit_scores(train.x.numpy(), train.y.numpy(), test.x.numpy(), 10.0)
    for name, of_class, y in zip(NAMES, scores.T.tolist(), test.y.T.tolist(), strict=True):
        assert metrics[f"ap11/{name}"] == pytest.approx(100 * by_definition(of_class, y, "voc07"), abs=1e-9)
    assert metrics["map11"] == pytest.approx(np.mean([metrics[f"ap11/{name}"] for name in NAMES]))


def test_classes_without_images_are_named_and_left_out() -> None:
    train, test = some_features()
    whole = multilabel(train, test, MultilabelConfig(l2=10.0))
    y, y_test = train.y.clone(), test.y.clone()
    y[y[:, 0] == 1, 0], y[:, 1], y_test[y_test[:, 2] == 1, 2] = -1, 1, 0  # never shown, always shown, never in test
    with pytest.warns(UserWarning, match=r"left out of the mean.*: ant, bee, cat$"):
        metrics = multilabel(Features(train.x, y, NAMES), Features(test.x, y_test, NAMES), MultilabelConfig(l2=10.0))
    assert metrics["ap11/dog"] == metrics["map11"] == pytest.approx(whole["ap11/dog"], abs=1e-9)
    assert not {"ap11/ant", "ap11/bee", "ap11/cat"} & set(metrics)
    with pytest.raises(UserError, match="no class"):
        multilabel(Features(train.x, torch.zeros_like(y)), test, MultilabelConfig())


def test_wrong_features() -> None:
    train, test = some_features()
    single = Features(train.x, torch.zeros(300, dtype=torch.int64))
    config = MultilabelConfig(l2=1.0)
    with pytest.raises(UserError, match=r"one class an image.*--on knn"):
        multilabel(single, test, config)
    with pytest.raises(UserError, match="test split has no labels"):
        multilabel(train, Features(test.x), config)
    with pytest.raises(UserError, match="labels other than"):
        multilabel(train, Features(test.x, test.y + 1), config)
    with pytest.raises(UserError, match=r"\[300, 24\] and labels \[200, 4\]"):
        multilabel(Features(train.x, train.y[:200]), test, config)
    with pytest.raises(UserError, match="24 dimensions in train and 20 in test"):
        multilabel(train, Features(test.x[:, :20], test.y), config)
    with pytest.raises(UserError, match="4 classes in train and 3 in test"):
        multilabel(train, Features(test.x, test.y[:, :3]), config)
    with pytest.raises(RunError, match="not finite"):
        multilabel(Features(train.x * math.inf, train.y), test, config)


def test_too_few_images_to_choose_l2() -> None:
    few = Features(torch.eye(6), torch.tensor([[1], [0], [0], [0], [0], [0]]))
    # The one image that is held out does not show the class.
    seed = next(seed for seed in range(99) if permutation(seed, 0, 6)[0] != 0)
    with pytest.raises(UserError, match=r"multilabel\.l2: 6 training images are too few"):
        multilabel(few, few, MultilabelConfig(seed=seed))
    assert multilabel(few, few, MultilabelConfig(seed=seed, l2=1.0))["map11"] == 100.0


@pytest.mark.parametrize(
    ("function", "config"), [(knn, KNNConfig()), (linear, LinearConfig()), (linear_fast, LinearFastConfig())]
)
def test_evaluations_of_one_class_an_image_say_what_to_use(function, config) -> None:
    train, test = some_features()
    with pytest.raises(UserError, match=r"several classes an image.*\[300, 4\].*--on multilabel"):
        function(train, test, config)


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    train, test = some_features()
    moved = [Features(part.x.cuda(), part.y, NAMES) for part in (train, test)]
    for config in (MultilabelConfig(), MultilabelConfig(solver="adam", lr=1e-2, epochs=10)):
        assert multilabel(*moved, config) == pytest.approx(multilabel(train, test, config), abs=0.05)
    scores, labels = test.x[:, :4], test.y
    found = average_precision(scores.cuda(), labels.cuda(), definition="all").cpu()
    torch.testing.assert_close(found, average_precision(scores, labels, definition="all"), rtol=0, atol=1e-12)
