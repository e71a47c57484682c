"""DeepCluster: its labels from independent packages, its classifier, its sampling, its ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clustered import FIRST, IMAGES, SECOND, Pass, batch_of, encoder, images
from mvmr.data.loading import weighted_draw
from mvmr.engine.optim import OptimizerConfig, build_optimizer
from mvmr.methods.deepcluster import DeepCluster, DeepClusterConfig
from mvmr.ops.kmeans import drawn_rows
from mvmr.ops.layers import redraw
from mvmr.ops.random import step_seed
from mvmr.types import Step, UserError
from ranks import run_on_ranks


def deepcluster(**settings: Any) -> DeepCluster:
    config = DeepClusterConfig(**{"clusters": 5, "pca_dim": 4, **settings})
    method = DeepCluster(encoder(), 12, config)
    torch.manual_seed(3)
    method.prepare(IMAGES)
    return method.double().train()


def test_labels_are_those_of_scikit_learn() -> None:
    method = deepcluster(clusters=8)
    with torch.no_grad():  # running statistics that are not those at the start
        method.encoder(images())
        h = method.encoder.eval()(images())
    method.train()
    white = normalize(torch.from_numpy(PCA(4, whiten=True, svd_solver="full").fit_transform(h.numpy())), dim=1)
    pass_over = Pass(method.encoder)
    method.before_step(FIRST, pass_over)
    assert pass_over.training == [False] * 4, "features are those of eval mode"
    assert method.encoder.training
    assert method.encoder[2].training
    # From the same images, in scikit-learn's own coordinates: the components' signs cancel.
    start = drawn_rows(white, torch.arange(IMAGES), 8, seed=step_seed(method._seed, 0, 0))
    theirs = KMeans(8, init=start.numpy(), n_init=1, max_iter=20, tol=0.0).fit(white.numpy())
    assert np.array_equal(method.labels.numpy(), theirs.labels_)


def test_clear_groups_are_found() -> None:
    method = deepcluster()
    method.before_step(FIRST, Pass(method.encoder))
    assert normalized_mutual_info_score(method.labels, torch.arange(IMAGES) % 5) > 0.85
    assert method.largest.item() == pytest.approx(float(method.labels.bincount().max()) / IMAGES)


def test_loss_is_the_cross_entropy_of_each_images_own_label() -> None:
    method, index = deepcluster(), torch.tensor([7, 59, 0, 31])
    method.labels.copy_(torch.randint(5, (IMAGES,), generator=torch.Generator().manual_seed(1)))
    terms = method.loss(batch_of(index), FIRST)
    h = method.encoder(images()[index])
    assert h.min() < 0, "so that the ReLU shows"
    expected = cross_entropy(method.head(h.clamp(min=0)), method.labels[index])
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    linear = deepcluster(relu=False)
    linear.labels.copy_(method.labels)
    expected = cross_entropy(linear.head(linear.encoder(images()[index])), linear.labels[index])
    assert linear.loss(batch_of(index), FIRST)["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_classifier_is_drawn_anew_with_the_labels() -> None:
    method = deepcluster(clusters=50)
    nn.init.ones_(method.head.weight)
    nn.init.ones_(method.head.bias)
    redrawn = list(method.before_step(FIRST, Pass(method.encoder)))
    assert [id(p) for p in redrawn] == [id(p) for p in method.head.parameters()]
    first = method.head.weight.detach().clone()
    assert first.std().item() == pytest.approx(0.01, rel=0.1)
    assert first.mean().abs().item() < 0.002
    assert method.head.bias.abs().max() == 0
    method.before_step(SECOND, Pass(method.encoder))
    assert not torch.equal(method.head.weight, first)
    again = deepcluster(clusters=50)
    again.before_step(FIRST, Pass(again.encoder))
    assert torch.equal(again.head.weight, first), "a function of the run's seed and the step"


def test_relabels_when_due_and_then_only() -> None:
    method = deepcluster(relabel_epochs=2)
    calls = []
    for number in range(40):
        pass_over = Pass(method.encoder)
        redrawn = list(method.before_step(Step(number, 40, 10), pass_over))
        assert bool(redrawn) == bool(pass_over.training)
        calls += [number] if redrawn else []
    assert calls == [0, 20]


def test_agreement_between_relabellings_is_logged() -> None:
    method, index = deepcluster(), torch.arange(10)
    method.before_step(FIRST, Pass(method.encoder))
    assert method.loss(batch_of(index), FIRST)["nmi"].item() == 0.0, "there is nothing to agree with yet"
    before = method.labels.clone()
    with torch.no_grad():
        method.encoder[1].weight.add_(torch.randn_like(method.encoder[1].weight))
    method.before_step(SECOND, Pass(method.encoder))
    expected = normalized_mutual_info_score(before, method.labels, average_method="geometric")
    assert 0 < expected < 1
    assert method.loss(batch_of(index), SECOND)["nmi"].item() == pytest.approx(expected)


def test_images_are_drawn_uniformly_over_clusters() -> None:
    method = deepcluster()
    method.labels.copy_((torch.arange(IMAGES) > 2) + 0)  # three images of one cluster, fifty-seven of another
    drawn = torch.cat([weighted_draw(0, epoch, method.sampling_weights()) for epoch in range(100)])
    shares = method.labels[drawn].bincount() / len(drawn)
    assert shares.tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    official = deepcluster(official_positions=True)
    official.labels.copy_(method.labels)
    assert torch.equal(official.sampling_weights(), method.sampling_weights()), "labels are in order here"
    official.labels.copy_(method.labels.flip(0))
    assert not torch.equal(official.sampling_weights(), method.sampling_weights().flip(0))


def test_the_classifier_has_no_momentum() -> None:
    method = deepcluster()
    settings = OptimizerConfig(name="sgd", lr=0.1, weight_decay=1e-5, decay_biases_and_norms=True)
    optimizer = build_optimizer(method.parameter_groups(), settings, 0.1)
    index = torch.arange(10)
    for _ in range(3):
        optimizer.zero_grad()
        method.loss(batch_of(index), FIRST)["loss"].backward()
        optimizer.step()
    buffers = [optimizer.state[p].get("momentum_buffer") for p in method.head.parameters()]
    assert buffers == [None, None]
    assert all(optimizer.state[p]["momentum_buffer"] is not None for p in method.encoder.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-5}


def test_two_passes_give_the_same_labels() -> None:
    once, twice = deepcluster(), deepcluster(two_passes=True)
    for method in (once, twice):
        method.before_step(FIRST, Pass(method.encoder))
    assert torch.equal(once.labels, twice.labels)


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(UserError, match=rf"method\.clusters is {IMAGES + 1}, but there are {IMAGES} images"):
        deepcluster(clusters=IMAGES + 1)
    assert deepcluster(clusters=IMAGES).labels.unique().numel() == IMAGES


def test_redrawing_is_a_function_of_the_seed() -> None:
    layers = [nn.Linear(200, 100), nn.Linear(200, 100)]
    for layer in layers:
        redraw(layer.parameters(), seed=5, std=0.2)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert layers[0].weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert layers[0].bias.abs().max() == 0
    redraw(layers[1].parameters(), seed=6, std=0.2)
    assert not torch.equal(layers[0].weight, layers[1].weight)


def on_rank(rank: int, ranks: int) -> tuple[Tensor, Tensor, float]:
    torch.set_num_threads(1)
    method = deepcluster(clusters=7)
    for step in (FIRST, SECOND):
        method.before_step(step, Pass(method.encoder, rank, ranks))
        with torch.no_grad():
            method.encoder[1].weight.mul_(torch.linspace(0.5, 2, 48, dtype=torch.float64))
    return method.labels, method.head.weight.detach(), method.nmi.item()


def test_ranks_have_the_labels_of_one_process() -> None:
    labels, weight, nmi = on_rank(0, 1)
    for theirs, their_weight, their_nmi in run_on_ranks(on_rank, 2, 2):
        assert torch.equal(theirs, labels)
        assert torch.equal(their_weight, weight)
        assert their_nmi == nmi
