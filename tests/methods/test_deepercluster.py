"""DeeperCluster: rotations, two levels of clusters, and the two methods that it has for limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn.functional import cross_entropy

from clustered import FIRST, IMAGES, SECOND, Pass, batch_of, encoder, images
from mvmr.methods.deepcluster import DeepCluster, DeepClusterConfig
from mvmr.methods.deepercluster import DeeperCluster, DeeperClusterConfig
from mvmr.types import Step, UserError
from ranks import run_on_ranks


def deepercluster(**settings: Any) -> DeeperCluster:
    config = DeeperClusterConfig(**{"clusters": 6, "super_clusters": 2, "pca_dim": 4, **settings})
    method = DeeperCluster(encoder(), 12, config)
    torch.manual_seed(3)
    method.prepare(IMAGES)
    return method.double().train()


def relabelled(**settings: Any) -> DeeperCluster:
    method = deepercluster(**settings)
    method.before_step(FIRST, Pass(method.encoder))
    return method


def test_loss_is_that_of_the_equation() -> None:
    """-ln V_y - ln W_y,z of every rotated image, with y = (rotation, super-cluster): by hand."""
    method, index = relabelled(), torch.arange(40, 56)
    turns = method._turns(index)
    assert len(turns.unique()) == 4
    rotated = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(images()[index], turns, strict=True)])
    f = method.encoder(rotated).clamp(min=0)
    expected = 0.0
    for n in range(16):
        y, z = int(turns[n]) * 2 + int(method.supers[index[n]]), int(method.subs[index[n]])
        top = method.super_head.weight @ f[n] + method.super_head.bias
        bottom = method.sub_heads.weight[y] @ f[n] + method.sub_heads.bias[y]
        expected -= (top.log_softmax(0)[y] + bottom.log_softmax(0)[z]).item() / 16
    terms = method.loss(batch_of(index), FIRST)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-10)
    assert (terms["super"] + terms["sub"]).item() == pytest.approx(expected, rel=1e-10)
    assert method.super_head.weight.shape == (8, 12)
    assert method.sub_heads.weight.shape == (8, 3, 12)


def test_one_super_cluster_and_no_rotation_is_deepcluster() -> None:
    settings = {"clusters": 6, "pca_dim": 4, "iterations": 10}
    plain = DeepCluster(encoder(), 12, DeepClusterConfig(**settings))
    torch.manual_seed(3)
    plain.prepare(IMAGES)
    plain = plain.double().train()
    deeper = deepercluster(**settings, super_clusters=1, rotations=False, epsilon=0.0)
    plain.before_step(FIRST, Pass(plain.encoder))
    deeper.before_step(FIRST, Pass(deeper.encoder))
    assert deeper.supers.max() == 0
    assert torch.equal(deeper.subs, plain.labels)
    with torch.no_grad():
        plain.head.weight.copy_(deeper.sub_heads.weight[0])
        plain.head.bias.copy_(deeper.sub_heads.bias[0])
    batch = batch_of(torch.arange(30))
    losses = [method.loss(batch, FIRST)["loss"] for method in (plain, deeper)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(deeper.encoder.parameters(), plain.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(deeper.sampling_weights(), plain.sampling_weights())


def test_one_cluster_is_rotnet() -> None:
    method, index = deepercluster(clusters=1, super_clusters=1), torch.arange(30)
    pass_over = Pass(method.encoder)
    before = method.super_head.weight.clone()
    assert list(method.before_step(FIRST, pass_over)) == []
    assert pass_over.training == [], "there is nothing to label"
    assert torch.equal(method.super_head.weight, before), "and the classifier of rotations lives on"
    assert method.sampling_weights() is None
    turns = method._turns(index)
    rotated = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(images()[index], turns, strict=True)])
    expected = cross_entropy(method.super_head(method.encoder(rotated).clamp(min=0)), turns)
    terms = method.loss(batch_of(index), FIRST)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert terms["sub"].item() == 0.0


def test_every_image_meets_all_rotations_equally_often() -> None:
    method, index = deepercluster(), torch.arange(IMAGES)
    seen = []
    for number in range(1, 400):
        method.before_step(Step(number, 4000, 1000), Pass(method.encoder))
        seen.append(method._turns(index))
    counts = torch.stack([(torch.stack(seen) == turn).sum(0) for turn in range(4)])  # [4, IMAGES]
    assert (counts - 399 / 4).abs().max() < 5 * (399 * 3 / 16) ** 0.5
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method._turns(index[order]), seen[-1][order]), "a function of the image, not of its place"


def test_the_batch_itself_is_not_rotated() -> None:
    method, index = deepercluster(), torch.arange(20)
    batch = batch_of(index)
    before = batch.views["global"].clone()
    first = method.loss(batch, FIRST)["loss"]
    assert torch.equal(batch.views["global"], before)
    assert method.loss(batch, FIRST)["loss"].item() == first.item()


def test_clusters_of_the_second_level_lie_within_the_first() -> None:
    method = relabelled(clusters=6, super_clusters=2)
    assert method.supers.unique().tolist() == [0, 1]
    assert method.subs.min() == 0
    assert method.subs.max() == 2
    flat = method._flat()
    assert len(flat.unique()) == 6
    for cluster in flat.unique():
        assert len(method.supers[flat == cluster].unique()) == 1
    weights = method.sampling_weights()
    totals = [weights[flat == cluster].sum().item() for cluster in flat.unique()]
    assert totals == pytest.approx([1.0] * 6)


def test_clear_groups_are_found() -> None:
    method = relabelled(clusters=10)
    truth = torch.arange(IMAGES) % 5
    purity = sum(int(truth[method._flat() == cluster].bincount().max()) for cluster in method._flat().unique())
    assert purity / IMAGES > 0.9


def test_relabels_every_t_epochs_with_classifiers_anew() -> None:
    method = deepercluster(relabel_epochs=3)
    calls = []
    for number in range(90):
        before = method.sub_heads.weight.detach().clone()
        redrawn = list(method.before_step(Step(number, 90, 10), Pass(method.encoder)))
        if redrawn:
            calls.append(number)
            assert {id(p) for p in redrawn} == {
                *map(id, method.super_head.parameters()),
                *map(id, method.sub_heads.parameters()),
            }
        assert torch.equal(method.sub_heads.weight, before) != bool(redrawn)
    assert calls == [0, 30, 60]
    assert 0 < method.nmi.item() <= 1
    assert method.sub_heads.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_agreement_is_that_of_all_clusters() -> None:
    method = relabelled(relabel_epochs=1)
    assert method.nmi.item() == 0.0
    before = method._flat().clone()
    with torch.no_grad():
        method.encoder[1].weight.add_(torch.randn_like(method.encoder[1].weight))
    method.before_step(SECOND, Pass(method.encoder))
    expected = normalized_mutual_info_score(before, method._flat(), average_method="geometric")
    assert method.nmi.item() == pytest.approx(expected)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        DeeperClusterConfig(clusters=10, super_clusters=4)
    with pytest.raises(UserError, match=rf"method\.clusters is 62, but there are {IMAGES} images"):
        deepercluster(clusters=62)


def on_rank(rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.set_num_threads(1)
    method = deepercluster(relabel_epochs=1)
    for step in (FIRST, SECOND):
        method.before_step(step, Pass(method.encoder, rank, ranks))
        with torch.no_grad():
            method.encoder[1].weight.mul_(torch.linspace(0.5, 2, 48, dtype=torch.float64))
    return method.supers, method.subs, method.sub_heads.weight.detach()


def test_ranks_have_the_labels_of_one_process() -> None:
    whole = on_rank(0, 1)
    for found in run_on_ranks(on_rank, 2, 2):
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
