"""Self-Label: labels against two solvers of POT, when they are made, and by which heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ot as pot  # codespell:ignore
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mvmr.errors import UserError
from mvmr.methods.self_label import SelfLabel, SelfLabelConfig
from mvmr.types import Batch, Step
from ranks import run_on_ranks

IMAGES, CLUSTERS = 120, 6
FIRST = Step(0, 50, 5)


class Shards:
    """A pass over random images, of which each rank has its share."""

    def __init__(self, rank: int = 0, ranks: int = 1):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(IMAGES, 3, 2, 2, generator=generator, dtype=torch.float64)
        self.index = torch.arange(rank, IMAGES, ranks)
        self.modes: list[bool] = []
        self.passes = 0

    def __call__(self, fn: Callable[[Tensor], Tensor], /) -> tuple[Tensor, Tensor]:
        self.passes += 1
        assert isinstance(fn, nn.Module)
        self.modes.append(fn.training)
        return self.index, fn(self.images[self.index])

    def representation(self, name: str, /) -> tuple[Tensor, Tensor]:
        raise AssertionError("there is no teacher")


def self_label(**settings: Any) -> SelfLabel:
    """A small one, whose two heads are as sharp as trained ones."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Dropout(0.5))
    given = {"heads": 2, "clusters": CLUSTERS, "strength": 10.0, "labellings": 4, "tolerance": 1e-6, **settings}
    method = SelfLabel(encoder, 10, SelfLabelConfig.model_validate(given)).double()
    with torch.no_grad():
        method.head.weight.mul_(6)
    method.prepare(IMAGES)
    return method


def batch_of(images: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(1, images, 3, 2, 2, generator=generator, dtype=torch.float64)
    return Batch(torch.randperm(IMAGES, generator=generator)[:images], {"global": views}, {})


def log_probabilities(method: SelfLabel, head: int) -> np.ndarray:
    logits = method.head(method.encoder.eval()(Shards().images)).unflatten(1, (-1, CLUSTERS))[:, head]
    return logits.log_softmax(1).detach().numpy()


def test_defaults_are_the_paper_s_for_imagenet() -> None:
    config = SelfLabelConfig()
    assert (config.heads, config.clusters, config.strength, config.tolerance) == (10, 3000, 25.0, 0.1)
    assert (config.labellings, config.spacing, config.relabel, config.label_mode) == (100, 2.0, "all", "eval")
    assert (SelfLabel.base_lr, SelfLabel.loss_is_progress, config.needs) == (0.08, False, {"global": 1})
    for wrong in ({"heads": 0}, {"clusters": 1}, {"strength": 0}, {"relabel": "none"}, {"lamb": 1}):
        with pytest.raises(ValidationError):
            SelfLabelConfig.model_validate(wrong)


def test_labels_start_in_equal_shares_and_differ_from_head_to_head() -> None:
    method = self_label()
    assert method.labels.shape == (2, IMAGES)
    for head in method.labels:
        assert torch.equal(head.bincount(), torch.full((CLUSTERS,), IMAGES // CLUSTERS))
    assert (method.labels[0] == method.labels[1]).float().mean() < 0.4
    assert torch.equal(self_label().labels, method.labels), "of the run's seed"


@pytest.mark.parametrize(("strength", "sharpness"), [(2.0, 1.0), (10.0, 1.0), (25.0, 0.3)])
def test_labels_are_those_of_pot(strength: float, sharpness: float) -> None:
    method = self_label(strength=strength)
    method.head.weight.data.mul_(sharpness)
    costs = [-log_probabilities(method, head) for head in range(2)]
    rows, columns = np.full(IMAGES, 1 / IMAGES), np.full(CLUSTERS, 1 / CLUSTERS)
    method.before_step(FIRST, Shards())
    for head, cost in enumerate(costs):
        plan = pot.sinkhorn(
            rows, columns, cost, reg=1 / strength, method="sinkhorn_log", numItermax=20_000, stopThr=1e-10
        )
        assert torch.equal(method.labels[head].long(), torch.from_numpy(plan.argmax(1)))


def test_labels_of_a_strong_lambda_are_nearly_those_of_exact_transport() -> None:
    method = self_label(strength=80.0, tolerance=0.05)
    cost = -log_probabilities(method, 0)
    exact = pot.emd(np.full(IMAGES, 1 / IMAGES), np.full(CLUSTERS, 1 / CLUSTERS), cost).argmax(1)
    method.before_step(FIRST, Shards())
    labels = method.labels[0].numpy()
    assert (labels == exact).mean() >= 0.95
    every = np.arange(IMAGES)
    assert cost[every, labels].mean() == pytest.approx(cost[every, exact].mean(), rel=0.01)
    greedy = cost.argmin(1)
    assert np.abs(np.bincount(greedy, minlength=CLUSTERS) - 20).max() > 5, "the best labels alone are not balanced"
    assert np.abs(np.bincount(labels, minlength=CLUSTERS) - 20).max() <= 2


def test_as_many_clusters_as_images_make_a_permutation() -> None:
    torch.manual_seed(0)
    config = SelfLabelConfig(heads=1, clusters=IMAGES, strength=80.0, tolerance=0.05)
    method = SelfLabel(nn.Flatten(), 12, config).double()
    method.head.weight.data.mul_(10)
    method.prepare(IMAGES)
    method.before_step(FIRST, Shards())
    assert len(method.labels[0].unique()) >= 0.95 * IMAGES
    greedy = method.head(Shards().images.flatten(1)).argmax(1)
    assert len(greedy.unique()) < 0.8 * IMAGES


def test_labels_that_are_not_found_in_time_are_warned_of() -> None:
    method = self_label(heads=1, strength=300.0, tolerance=1e-9)
    with pytest.warns(UserWarning, match=r"step 0: labels of head 0 .* 10000 iterations.* raise method\.tolerance"):
        method.before_step(FIRST, Shards())


def test_loss_is_the_mean_over_images_and_heads() -> None:
    method, batch = self_label(), batch_of()
    method.encoder.eval()
    logits = method.head(method.encoder(batch.views["global"][0])).unflatten(1, (2, -1))
    total = 0.0
    for i, image in enumerate(batch.index.tolist()):
        for head in range(2):
            total -= logits[i, head].log_softmax(0)[int(method.labels[head, image])].item() / 16
    terms = method.loss(batch, FIRST)
    assert terms["loss"].item() == pytest.approx(total, abs=1e-10)
    right = (logits.argmax(2) == method.labels[:, batch.index].T).double().mean().item()
    assert terms["accuracy"].item() == pytest.approx(right)
    assert method.exported() is method.encoder


@pytest.mark.parametrize(("spacing", "expected"), [(1.0, [0, 19, 37, 56]), (2.0, [0, 7, 25, 56])])
def test_label_steps_are_a_function_of_the_step(spacing: float, expected: list[int]) -> None:
    """ceil((10 + 1.01) x 5 x (j / 3) ** spacing) for ten epochs of five steps; the last one never comes."""
    method = self_label(spacing=spacing)
    found = {number: method.due(Step(number, 50, 5)) for number in range(60)}
    assert {number: due for number, due in found.items() if due} == {step: [j] for j, step in enumerate(expected)}


def test_label_steps_that_fall_together_are_one() -> None:
    method, shards = self_label(labellings=40, spacing=2.0, relabel="in_turn"), Shards()
    assert method.due(Step(1, 50, 5)) == [1, 2, 3, 4, 5]
    method.before_step(Step(1, 50, 5), shards)
    assert shards.passes == 1
    assert sum(len(method.due(Step(number, 50, 5))) for number in range(57)) == 40


def test_one_labelling_is_at_the_start() -> None:
    method = self_label(labellings=1)
    assert [number for number in range(60) if method.due(Step(number, 50, 5))] == [0]


def test_heads_are_labelled_all_at_once_or_in_turn() -> None:
    start = self_label().labels
    for relabel, changed in (("all", [True, True]), ("in_turn", [True, False])):
        method = self_label(relabel=relabel)
        method.before_step(FIRST, Shards())
        assert [not torch.equal(method.labels[head], start[head]) for head in range(2)] == changed, relabel
    method.before_step(Step(7, 50, 5), Shards())  # the second of the label steps
    assert not torch.equal(method.labels[1], start[1])
    assert method.relabelled.item() == (method.labels[1] != start[1]).double().mean().item()


def test_labels_of_eval_mode_depend_on_the_weights_alone() -> None:
    method, shards = self_label(), Shards()
    method.train()
    method.encoder[2].eval()  # a part that is frozen stays so
    state = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    drawn = torch.get_rng_state()
    method.before_step(FIRST, shards)
    assert shards.modes == [False]
    assert method.encoder.training
    assert not method.encoder[2].training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in method.encoder.state_dict().items())
    first = method.labels.clone()
    method.before_step(FIRST, shards)
    assert torch.equal(method.labels, first)
    assert method.relabelled.item() == 0.0


def test_labels_of_train_mode_have_dropout_that_repeats_and_move_batch_norm() -> None:
    found = []
    for number in range(2):
        torch.manual_seed(number)
        method, shards = self_label(label_mode="train"), Shards()
        torch.manual_seed(number)
        drawn = torch.get_rng_state()
        method.train()
        method.before_step(FIRST, shards)
        assert shards.modes == [True]
        assert torch.equal(torch.get_rng_state(), drawn)
        assert method.encoder[2].running_mean.abs().sum() > 0
        found.append(method.labels.clone())
    assert torch.equal(found[0], found[1])
    method.before_step(Step(7, 50, 5), shards)
    assert not torch.equal(method.labels, found[0]), "another step drops others"


def test_state_is_saved() -> None:
    method = self_label()
    method.before_step(FIRST, Shards())
    again = self_label()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.labels, method.labels)


def labels(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    torch.set_num_threads(1)
    method = self_label()
    method.before_step(FIRST, Shards(rank, ranks))
    return method.labels.clone(), method.relabelled.clone()


@pytest.mark.parametrize("ranks", [2, 4])
def test_labels_are_identical_on_any_number_of_ranks(ranks: int) -> None:
    expected, changed = labels(0, 1)
    for found, share in run_on_ranks(labels, ranks, ranks):
        assert torch.equal(found, expected)
        assert torch.equal(share, changed)


def test_more_labels_than_images_are_refused() -> None:
    method = self_label()
    with pytest.raises(UserError, match=rf"method\.clusters is {CLUSTERS}, but there are {CLUSTERS - 1} images"):
        method.prepare(CLUSTERS - 1)
