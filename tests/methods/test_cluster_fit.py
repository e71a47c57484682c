"""ClusterFit: one clustering of the teacher's embeddings, the same on any number of ranks, and cross-entropy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mvmr.config import load
from mvmr.methods.cluster_fit import ClusterFit, ClusterFitConfig
from mvmr.ops.labels import normalised_mutual_information
from mvmr.types import Batch, Step, UserError
from ranks import run_on_ranks

IMAGES = 60
FIRST = Step(0, 10, 5)


class Shards:
    """A pass over blobs around four points, of which each rank has its share."""

    def __init__(self, rank: int = 0, ranks: int = 1, *, scale: Tensor | None = None):
        generator = torch.Generator().manual_seed(0)
        centres = 20 * torch.randn(4, 7, generator=generator)
        self.group = torch.arange(IMAGES) % 4
        self.rows = centres[self.group] + torch.randn(IMAGES, 7, generator=generator)
        if scale is not None:
            self.rows = self.rows * scale[:, None]
        self.index = torch.arange(rank, IMAGES, ranks)
        self.asked: list[str] = []

    def __call__(self, fn: Callable[[Tensor], Tensor], /) -> tuple[Tensor, Tensor]:
        raise AssertionError("the student does not take part")

    def representation(self, name: str, /) -> tuple[Tensor, Tensor]:
        self.asked.append(name)
        return self.index, self.rows[self.index]


def cluster_fit(**settings: Any) -> ClusterFit:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    given = {"clusters": 4, "iterations": 20, "teacher_width": 7, **settings}
    method = ClusterFit(encoder, 10, ClusterFitConfig.model_validate(given))
    method.prepare(IMAGES)
    return method


def batch_of(images: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(1, images, 3, 2, 2, generator=generator)
    return Batch(torch.randperm(IMAGES, generator=generator)[:images], {"global": views}, {})


def test_defaults_are_the_released_code_s() -> None:
    config = ClusterFitConfig()
    assert (config.clusters, config.iterations, config.normalise) == (16000, 50, False)
    assert (ClusterFit.base_lr, config.needs) == (0.1, {"global": 1})
    for wrong in ({"clusters": 1}, {"iterations": 0}, {"k": 4}):
        with pytest.raises(ValidationError):
            ClusterFitConfig.model_validate(wrong)


def test_more_clusters_than_images_are_refused() -> None:
    assert len(cluster_fit(clusters=IMAGES).labels.unique()) == IMAGES
    with pytest.raises(UserError, match=r"method\.clusters is 61, but there are 60 images to cluster: take fewer"):
        cluster_fit(clusters=IMAGES + 1)


def test_the_page_s_overrides_make_cc() -> None:
    """CompRess's run_cc.sh, with its kmeans.py and train_kmeans.py."""
    page = (Path(__file__).parents[2] / "docs/methods/cluster_fit.md").read_text()
    (block,) = re.findall(r"```\nmvmr train (cluster_fit_imagenet .*?)```", page, flags=re.DOTALL)
    recipe, *words = block.replace("\\\n", " ").split()
    run = load(recipe, [word for word in words if not word.endswith(("=DIR", "=FILE"))])
    assert (run.method.clusters, run.method.iterations, run.method.normalise) == (16000, 20, True)
    augmented = run.views.crops["augmented"]
    assert (augmented.jitter, augmented.gray, augmented.blur) == (None, 0.0, None)
    assert (run.optimizer.name, run.optimizer.lr, run.optimizer.momentum, run.optimizer.nesterov) == (
        "sgd",
        0.1,
        0.9,
        True,
    )
    schedule = run.schedule
    assert (schedule.epochs, schedule.shape, schedule.warmup_epochs, schedule.final) == (100, "cosine", 0, 0.0)
    assert (run.encoder.name, run.encoder.zero_init_residual, run.data.batch_size) == ("resnet18", False, 256)


def test_labels_are_the_clusters_of_the_teacher_and_stay() -> None:
    method, shards = cluster_fit(), Shards()
    assert torch.equal(method.labels.bincount(), torch.full((4,), 15)), "of equal shares before the first step"
    assert normalised_mutual_information(method.labels, shards.group) < 0.3
    assert list(method.before_step(FIRST, shards)) == []
    assert normalised_mutual_information(method.labels, shards.group) == pytest.approx(1.0)
    labels = method.labels.clone()
    for number in range(1, 10):
        method.before_step(Step(number, 10, 5), shards)
    assert shards.asked == ["teacher"], "once, from the cache"
    assert torch.equal(method.labels, labels)
    again = cluster_fit()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.labels, labels), "a run that is continued has them"


def test_normalised_embeddings_are_clustered_by_direction() -> None:
    scale = torch.where(torch.rand(IMAGES, generator=torch.Generator().manual_seed(5)) < 0.5, 1.0, 30.0)
    shards = Shards(scale=scale)
    found = []
    for normalise in (True, False):
        method = cluster_fit(normalise=normalise)
        method.before_step(FIRST, shards)
        found.append(normalised_mutual_information(method.labels, shards.group))
    assert found[0] == pytest.approx(1.0)
    assert found[1] < 0.95


def test_loss_is_the_cross_entropy_of_the_batch_s_labels() -> None:
    method, batch = cluster_fit(), batch_of()
    logits = method.head(method.encoder(batch.views["global"][0]))
    total = 0.0
    for i, image in enumerate(batch.index.tolist()):
        total -= logits[i].log_softmax(0)[method.labels[image]].item() / 8
    terms = method.loss(batch, FIRST)
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    assert terms["accuracy"].item() == (logits.argmax(1) == method.labels[batch.index]).float().mean().item()
    shares = functional.softmax(logits, dim=1).mean(0)
    assert terms["entropy/mean"].item() == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)
    assert method.exported() is method.encoder


def labels(rank: int, ranks: int) -> Tensor:
    method = cluster_fit(clusters=6)
    method.before_step(FIRST, Shards(rank, ranks))
    return method.labels.clone()


@pytest.mark.parametrize("ranks", [2, 4])
def test_labels_are_identical_on_any_number_of_ranks(ranks: int) -> None:
    expected = labels(0, 1)
    for found in run_on_ranks(labels, ranks, ranks):
        assert torch.equal(found, expected)
