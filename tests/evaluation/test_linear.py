from __future__ import annotations

import math
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.linear import (
    LinearConfig,
    LinearFastConfig,
    adam_layer,
    linear,
    linear_fast,
)
from mvmr.evaluation.regularisation import logistic_regression, standardisation
from mvmr.types import Features, RunError, Section, UserError


def blobs(*, classes: int = 6, spread: float = 0.3, dtype: torch.dtype = torch.float32) -> tuple[Features, Features]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 16, generator=generator, dtype=dtype)
    parts = []
    for count in (40, 20):
        y = torch.arange(count * classes) % classes
        noise = torch.randn(len(y), 16, generator=generator, dtype=dtype)
        parts.append(Features(centres[y] + spread * noise, y))
    return parts[0], parts[1]


def digits_split(dtype: torch.dtype = torch.float32) -> tuple[Features, Features]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=dtype), torch.tensor(digits.target)
    return Features(x[:1200], y[:1200]), Features(x[1200:], y[1200:])


def skewed(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Correlated, heavy-tailed, non-negative features like those behind a ReLU, with overlapping classes."""
    y = torch.randint(0, 8, (count,), generator=generator)
    latent = torch.randn(count, 10, generator=generator) + torch.eye(8, 10)[y]
    mixing = torch.randn(10, 60, generator=torch.Generator().manual_seed(7))
    return (latent @ mixing + 2.0 * torch.randn(count, 60, generator=generator)).relu().square(), y


# linear


def test_linear_separates_what_is_separable() -> None:
    train, test = blobs()
    assert linear(train, test, LinearConfig(lr=1e-2, epochs=50)) == {"top1": 100.0, "top5": 100.0, "n_train": 240.0}


def test_defaults_are_the_papers_protocol() -> None:
    assert LinearConfig().model_dump() == {
        "lr": 1e-4, "batch_size": 256, "epochs": 100, "labels_per_class": None, "seed": 0,
    }  # fmt: skip


def test_linear_is_adam_from_zero() -> None:
    """Kingma and Ba, algorithm 1, written out, on the mean cross-entropy's own gradient."""
    train, _ = blobs(spread=1.0, dtype=torch.float64)
    config = LinearConfig(lr=1e-2, epochs=3, batch_size=50)
    weight, bias = adam_layer(train.x, train.y, classes=6, config=config, generator=torch.Generator().manual_seed(4))
    extended = torch.cat([train.x, torch.ones(len(train.x), 1, dtype=torch.float64)], 1)  # the bias as one more column
    theta = torch.zeros(6, 17, dtype=torch.float64)
    first, second, t = torch.zeros_like(theta), torch.zeros_like(theta), 0
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        for chosen in torch.randperm(240, generator=generator).split(50):
            error = (extended[chosen] @ theta.T).softmax(1) - functional.one_hot(train.y[chosen], 6)
            gradient, t = error.T @ extended[chosen] / len(chosen), t + 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            theta = theta - 1e-2 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    assert t == 15  # 240 = 4 * 50 + 40: the last, smaller batch counts
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), theta)


def test_the_last_epoch_counts_not_the_best() -> None:
    train, test = blobs(spread=1.5)
    # Half of the test labels are wrong on purpose: fitting the training set further makes the test score fall.
    wrong = Features(test.x, torch.where(test.y % 2 == 0, (test.y + 2) % 6, test.y))
    path = [linear(train, wrong, LinearConfig(lr=1e-3, epochs=n, batch_size=16))["top1"] for n in range(1, 13)]
    assert path[-1] < max(path)
    assert linear(train, wrong, LinearConfig(lr=1e-3, epochs=12, batch_size=16))["top1"] == path[-1]


def test_linear_depends_on_its_seed_alone() -> None:
    train, _ = blobs(spread=1.0)

    def weight(seed: int) -> Tensor:
        config = LinearConfig(epochs=2, batch_size=32)
        generator = torch.Generator().manual_seed(seed)
        return adam_layer(train.x, train.y, classes=6, config=config, generator=generator)[0]

    torch.manual_seed(0)
    first = weight(0)
    torch.manual_seed(1)
    assert torch.equal(weight(0), first)
    assert not torch.equal(weight(1), first)


def test_probes_train_inside_no_grad() -> None:
    train, test = blobs()
    with torch.no_grad():
        assert linear(train, test, LinearConfig(lr=1e-2, epochs=20))["top1"] == 100.0
        assert linear_fast(train, test, LinearFastConfig())["top1"] == 100.0


# linear_fast


@pytest.mark.parametrize("l2", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("data", ["digits", "skewed"])
def test_linear_fast_is_scikit_learns_optimum(data: str, l2: float) -> None:
    if data == "digits":
        train, test = digits_split()
    else:
        generator = torch.Generator().manual_seed(1)
        train, test = Features(*skewed(2000, generator)), Features(*skewed(2000, generator))
    shift, scale = standardisation(train.x.double())
    x, x_test = (train.x.double() - shift) * scale, (test.x.double() - shift) * scale
    reference = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=20_000).fit(x.numpy(), train.y.numpy())
    expected = torch.tensor(reference.predict_proba(x_test.numpy()))

    classes = int(train.y.max()) + 1
    weight, bias = logistic_regression(x, train.y, classes=classes, l2=l2)
    found = functional.linear(x_test, weight, bias).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)

    right = torch.from_numpy(reference.predict(x_test.numpy())) == test.y
    metrics = linear_fast(train, test, LinearFastConfig(l2=l2))
    best = expected.topk(2, dim=1).values
    differing = (metrics.outcomes["top1"] == 100.0) != right
    # Only where the two best classes are equal but for the solvers' tolerances may the answers differ.
    assert all(gap < 1e-3 for gap in (best[:, 0] - best[:, 1])[differing].tolist())
    assert int(differing.sum()) <= max(1, len(right) // 1000)  # 0.1 points, or one image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_zero_at_the_solution(dtype: torch.dtype) -> None:
    x, y = skewed(1500, torch.Generator().manual_seed(2))
    shift, scale = standardisation(x)
    x = ((x - shift) * scale).to(dtype)
    weight, bias = logistic_regression(x, y, classes=8, l2=1.5)  # summed over 1,500 images
    error = (functional.linear(x, weight, bias).softmax(1) - functional.one_hot(y, 8)) / len(x)
    limit = 2e-4 if dtype == torch.float32 else 5e-6
    assert (error.T @ x + 1e-3 * weight).abs().max() < limit
    assert error.sum(0).abs().max() < limit


def test_a_solver_cut_short_says_so() -> None:
    train, test = digits_split()
    with pytest.warns(UserWarning, match=r"stopped short.*linear_fast\.max_iterations"):
        linear_fast(train, test, LinearFastConfig(l2=1e-3, max_iterations=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_fast(train, test, LinearFastConfig())


def test_shift_and_scale_of_features_change_nothing() -> None:
    train, test = digits_split(torch.float64)
    factor, offset = torch.logspace(-3, 3, 64, dtype=torch.float64), torch.linspace(-5, 5, 64, dtype=torch.float64)
    moved = [Features(part.x * factor + offset, part.y) for part in (train, test)]
    assert linear_fast(*moved, LinearFastConfig()) == linear_fast(train, test, LinearFastConfig())


def test_constant_dimensions_are_left_out() -> None:
    x = torch.randn(50, 4)
    x[:, 1], x[:, 2] = 0.0, 1234.567
    mean, inverse = standardisation(x)
    assert inverse[1] == 0
    assert inverse[2] == 0
    torch.testing.assert_close(inverse[[0, 3]], 1 / x[:, [0, 3]].std(0, correction=0))
    torch.testing.assert_close(mean, x.mean(0))
    train, test = blobs()
    padded = Features(torch.cat([train.x, torch.zeros(len(train.x), 1)], 1), train.y)
    wild = Features(torch.cat([test.x, torch.full((len(test.x), 1), 1e6)], 1), test.y)
    assert linear_fast(padded, wild, LinearFastConfig())["top1"] == linear_fast(train, test, LinearFastConfig())["top1"]


# both


CASES = [
    (linear, LinearConfig(lr=1e-2, epochs=3)),
    (linear_fast, LinearFastConfig()),
]


@pytest.mark.parametrize(("function", "config"), CASES)
def test_labels_per_class(function, config: Section) -> None:
    train, test = digits_split()
    metrics = function(train, test, config.model_copy(update={"labels_per_class": 10}))
    assert metrics["n_train"] == 100.0
    assert metrics == function(train, test, config.model_copy(update={"labels_per_class": 10}))
    assert function(train, test, config)["n_train"] == 1200.0
    fewest = int(train.y.bincount().min())
    with pytest.raises(UserError, match=rf"labels_per_class={fewest + 1}, but class \d has {fewest} training images"):
        function(train, test, config.model_copy(update={"labels_per_class": fewest + 1}))


@pytest.mark.parametrize(("function", "config"), CASES)
def test_only_the_chosen_images_are_used(function, config: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    import mvmr.evaluation.linear as module

    train, test = digits_split()
    chosen: list[Tensor] = []
    choose = module._some_labels

    def watched(x: Tensor, y: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        x, y = choose(x, y, *rest)
        chosen.append(x)
        assert y.bincount().tolist() == [7] * 10  # the same number of every class
        return x, y

    monkeypatch.setattr(module, "_some_labels", watched)
    for seed in (0, 0, 1):
        function(train, test, config.model_copy(update={"labels_per_class": 7, "seed": seed}))
    rows = [{tuple(row) for row in x.tolist()} for x in chosen]
    assert len(rows[0]) == 70  # without replacement
    assert rows[0] <= {tuple(row) for row in train.x.tolist()}
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.parametrize("kind", [LinearConfig, LinearFastConfig])
def test_all_evaluations_with_few_labels_draw_the_same_images(kind: type[LinearConfig | LinearFastConfig]) -> None:
    from mvmr.data.images import ArraySource
    from mvmr.evaluation.finetune import FinetuneConfig, positions
    from mvmr.evaluation.linear import _some_labels

    y = torch.arange(30) % 3
    source = ArraySource(torch.zeros(30, 3, 4, 4, dtype=torch.uint8), y, name="own/train", classes=("a", "b", "c"))
    x, labels = _some_labels(torch.arange(30.0)[:, None], y, source.classes, kind(labels_per_class=3, seed=2))
    assert x.flatten().long().tolist() == positions(source, FinetuneConfig(labels_per_class=3, seed=2)).tolist()
    assert torch.equal(labels, y[x.flatten().long()])


@pytest.mark.parametrize(("function", "config"), CASES)
def test_wrong_features(function, config: Section) -> None:
    train, test = blobs()
    with pytest.raises(UserError, match="train split has no labels"):
        function(Features(train.x), test, config)
    with pytest.raises(RunError, match="not finite"):
        function(Features(train.x * math.inf, train.y), test, config)
    named = Features(train.x, train.y, tuple(f"c{i}" for i in range(7)))
    with pytest.raises(UserError, match="class c6 has 0 training images"):
        function(named, test, config.model_copy(update={"labels_per_class": 2}))


@pytest.mark.parametrize(("function", "config"), CASES)
def test_top5_needs_more_than_five_classes(function, config: Section) -> None:
    train, test = blobs(classes=5)
    assert set(function(train, test, config)) - {"l2"} == {"top1", "n_train"}


def test_the_table_of_evaluations() -> None:
    on_features = {"knn", "linear", "linear_fast", "logistic", "retrieval", "clustering", "multilabel", "head"}
    assert {name for name, e in EVALUATIONS.items() if e.given(e.config()) == "features"} == on_features
    on_images = {"finetune", "robustness", "diagnostics", "zero_shot"}
    assert {name for name, e in EVALUATIONS.items() if e.given(e.config()) == "images"} == on_images
    assert set(EVALUATIONS) == on_features | on_images | {"detection", "instance", "semantic"}
    train, test = blobs()
    for name, evaluation in EVALUATIONS.items():
        assert evaluation.description
        if name in ("knn", "linear", "linear_fast"):  # the others need images, a folder, or several labels an image
            assert evaluation.function(train, test, evaluation.config())["top1"] > 50.0
