"""DeepCluster-v2: the bank of last epoch's embeddings, spherical clusterings of it, and centroids as classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clustered import FIRST, IMAGES, SECOND, Pass, batch_of, encoder, images
from mvmr.methods.deepcluster_v2 import DeepClusterV2, DeepClusterV2Config
from mvmr.ops.batch_norm import synchronise_batch_norm
from mvmr.types import Step, UserError
from ranks import run_on_ranks


def method_of(**settings: Any) -> DeepClusterV2:
    config = DeepClusterV2Config(**{"hidden": 16, "dim": 8, "prototypes": (5, 7, 4), **settings})
    method = DeepClusterV2(encoder(), 12, config)
    torch.manual_seed(3)
    method.prepare(IMAGES)
    return method.double().train()


def heads(method: DeepClusterV2) -> list[Tensor]:
    return [method.get_buffer(f"prototypes{head}") for head in range(3)]


def test_loss_is_the_mean_over_heads_views_and_images() -> None:
    method, index = method_of(), torch.tensor([8, 3, 55, 20])
    batch = batch_of(index, 2, local=1)
    loss = method.loss(batch, FIRST)["loss"]
    h = method.encoder(torch.cat([batch.views[name].flatten(0, 1) for name in ("global", "local")]))
    z = normalize(method.projector(h), dim=1)  # [3 B, D]: both streams have one size, so one pass
    losses = [
        cross_entropy(z @ c.T / 0.1, labels[index].repeat(3))
        for c, labels in zip(heads(method), method.labels, strict=True)
    ]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)


def test_prototypes_are_centroids_and_never_trained() -> None:
    method = method_of()
    method.before_step(FIRST, Pass(method.encoder))
    assert not any("prototypes" in name for name, _ in method.named_parameters())
    for head, (prototypes, labels) in enumerate(zip(heads(method), method.labels, strict=True)):
        x = method.bank[head % 2]
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(len(prototypes), dtype=torch.float64))
        assert torch.equal((x @ prototypes.T).argmax(1), labels)


def test_clear_groups_are_found_by_every_head() -> None:
    method = method_of(prototypes=(5, 5, 5))
    method.before_step(FIRST, Pass(method.encoder))
    for labels in method.labels:
        assert normalized_mutual_info_score(labels, torch.arange(IMAGES) % 5) > 0.75
    assert not torch.equal(method.labels[0], method.labels[2]), "each starts from images of its own"


def test_the_bank_is_filled_once_by_a_pass_in_train_mode() -> None:
    method = method_of()
    for number in range(40):
        pass_over = Pass(method.encoder)
        assert list(method.before_step(Step(number, 40, 10), pass_over)) == []
        assert pass_over.training == ([True] * 4 if number == 0 else [])
    torch.testing.assert_close(method.bank.norm(dim=2), torch.ones(2, IMAGES, dtype=torch.float64))
    expected = method_of()
    rows = [expected.projector(expected.encoder(part)) for part in images().split(15)]
    torch.testing.assert_close(method.bank[1], normalize(torch.cat(rows), dim=1).detach())


def test_a_step_writes_the_embeddings_of_its_images_after_it() -> None:
    method, index = method_of(), torch.tensor([8, 3, 55, 20])
    method.before_step(FIRST, Pass(method.encoder))
    before = method.bank.clone()
    z = method.embed(batch_of(index, 3))["z"].detach()
    method.loss(batch_of(index, 3), FIRST)
    assert torch.equal(method.bank, before)
    method.after_step(FIRST)
    torch.testing.assert_close(method.bank[:, index], z[:, :2].transpose(0, 1))
    others = torch.ones(IMAGES, dtype=torch.bool)
    others[index] = False
    assert torch.equal(method.bank[:, others], before[:, others])


def test_the_next_epochs_clusters_are_of_what_was_written() -> None:
    method = method_of(prototypes=(5, 5, 5))
    method.before_step(FIRST, Pass(method.encoder))
    labels, index = method.labels.clone(), torch.arange(IMAGES)
    with torch.no_grad():
        method.projector[0].weight.copy_(torch.randn_like(method.projector[0].weight))
    for number in range(10):
        method.loss(batch_of(index, 2), Step(number, 40, 10))
        method.after_step(Step(number, 40, 10))
    pass_over = Pass(method.encoder)
    method.before_step(SECOND, pass_over)
    assert pass_over.training == [], "no pass over the data: the bank is at hand"
    for head, prototypes in enumerate(heads(method)):
        assert torch.equal((method.bank[head % 2] @ prototypes.T).argmax(1), method.labels[head])
    agreement = [
        normalized_mutual_info_score(old, new, average_method="geometric")
        for old, new in zip(labels, method.labels, strict=True)
    ]
    assert 0 < sum(agreement) / 3 < 1
    assert method.nmi.item() == pytest.approx(sum(agreement) / 3)


def test_heads_alternate_between_the_banks() -> None:
    method = method_of(prototypes=(5, 5, 5))
    method.before_step(FIRST, Pass(method.encoder))
    method.bank[1] = normalize(torch.randn_like(method.bank[1]), dim=1)  # from now on the second view means nothing
    method.before_step(SECOND, Pass(method.encoder))
    truth = torch.arange(IMAGES) % 5
    agreement = [normalized_mutual_info_score(labels, truth) for labels in method.labels]
    assert agreement[1] < 0.4 < 0.75 < min(agreement[0], agreement[2])


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"the largest of method\.prototypes is 61, but there are 60 images"):
        method_of(prototypes=(5, 61))


def on_rank(rank: int, ranks: int) -> dict[str, Tensor]:
    """Everything after two relabellings and a step between them."""
    torch.set_num_threads(1)
    method = method_of()
    if ranks > 1:
        synchronise_batch_norm(method)
    method.before_step(FIRST, Everything(method.encoder, rank, ranks))
    batch = batch_of(torch.arange(40).chunk(ranks)[rank], 2)
    method.loss(batch, FIRST)
    method.after_step(FIRST)
    method.before_step(SECOND, Pass(method.encoder, rank, ranks))
    return {name: value.clone() for name, value in method.named_buffers()}


class Everything(Pass):
    """A rank's share of every part, so that batch norm over ranks sees the same parts on any number of them."""

    def __init__(self, net: Any, rank: int, ranks: int):
        super().__init__(net)
        self.shares = [part[rank::ranks] for part in self.index.split(20)]

    @torch.no_grad()
    def __call__(self, fn: Any, /) -> tuple[Tensor, Tensor]:
        return torch.cat(self.shares), torch.cat([fn(images()[share]) for share in self.shares])


def test_ranks_have_the_bank_and_labels_of_one_process() -> None:
    whole = on_rank(0, 1)
    for found in run_on_ranks(on_rank, 2, 2):
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            if value.dtype == torch.int64:
                assert torch.equal(found[name], value), name
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
