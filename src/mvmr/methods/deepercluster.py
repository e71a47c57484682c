"""DeeperCluster: Caron, Bojanowski, Mairal, Joulin, "Unsupervised pre-training of image features on non-curated data",
ICCV 2019. With one super-cluster and no rotation it is DeepCluster; with one cluster it is RotNet (Gidaris, Singh,
Komodakis, "Unsupervised representation learning by predicting image rotations", ICLR 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import Parameter, functional

from mvmr.data.view_ops import rotate90
from mvmr.losses.clustering import hierarchical_cross_entropy
from mvmr.losses.cosine import normalised_std
from mvmr.methods.base import Method, MethodConfig, check_clusters
from mvmr.nets.sub_heads import SubHeads
from mvmr.ops.kmeans import drawn_rows, kmeans
from mvmr.ops.labels import normalised_mutual_information, of_all_ranks, uniform_over_labels
from mvmr.ops.layers import redraw
from mvmr.ops.modes import evaluating
from mvmr.ops.random import step_seed, uniform
from mvmr.ops.whitening import whitened_pass
from mvmr.types import Batch, FeaturePass, Step

TURNS = 4
"""Rotations by 0, 90, 180 and 270 degrees."""
ROTATION_STREAM = 0xFFFFFFE0
"""The random stream of rotations, far from those of views."""


class DeeperClusterConfig(MethodConfig):
    """Settings of DeeperCluster; the defaults are the paper's for the 96 million images of YFCC100M."""

    needs: ClassVar[Mapping[str, int]] = {"global": 1}

    name: Literal["deepercluster"] = "deepercluster"
    """The method's key."""
    clusters: int = Field(320_000, ge=1)
    """k, the number of clusters in all (released command); about 300 images each there."""
    super_clusters: int = Field(4, ge=1)
    """m, the clusters of the first level; each is then clustered into k / m (released command: 16 super-classes)."""
    rotations: bool = True
    """Rotate each image by a random quarter turn, which is part of its super-class."""
    pca_dim: int = Field(4096, ge=1)
    """Principal components that are clustered, whitened; all of them where the encoder has fewer (released command)."""
    epsilon: float = Field(1e-5, ge=0)
    """Share of the largest variance that is added to each before whitening (released code)."""
    iterations: int = Field(10, ge=1)
    """Moves of the centroids in each clustering, from random images (released command)."""
    relabel_epochs: int = Field(3, ge=1)
    """T, epochs between two relabellings (released command)."""
    relu: bool = True
    """ReLU between the encoder and the classifiers, but not before k-means; see deepcluster."""
    two_passes: bool = False
    """Compute all features twice, so that only their principal components are ever held."""
    memory: int = Field(64, ge=1)
    """MiB of working space of k-means."""

    @model_validator(mode="after")
    def _equal_parts(self) -> DeeperClusterConfig:
        if self.clusters % self.super_clusters:
            raise ValueError(
                f"clusters is {self.clusters}, of which each of the {self.super_clusters} super_clusters gets an equal "
                f"part: take a multiple of {self.super_clusters}"
            )
        return self


class DeeperCluster(Method):
    """One classifier tells an image's rotation and super-cluster, and another one for each of these its sub-cluster."""

    Config: ClassVar[type[MethodConfig]] = DeeperClusterConfig
    summary: ClassVar[str] = "rotation and super-cluster told first, then the sub-cluster in it (Caron et al., 2019)"
    base_lr: ClassVar[float] = 0.1 * 256 / 3072  # released command: 0.1 at a batch of 48 x 64 images
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # the classes change, and the classifiers with them

    supers: Tensor
    subs: Tensor
    nmi: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: DeeperClusterConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        classes = config.super_clusters * (TURNS if config.rotations else 1)  # S
        self.super_head = nn.Linear(dim, classes)  # V
        self.sub_heads = SubHeads(dim, classes, config.clusters // config.super_clusters)  # W_1 .. W_S
        self._seed = self._step = 0

    def prepare(self, images: int) -> None:
        c = self.config
        check_clusters("method.clusters", c.clusters, images)
        self._seed = int(torch.randint(1 << 62, ()))
        number = torch.arange(images)
        self.register_buffer("supers", number % c.super_clusters)
        self.register_buffer("subs", number // c.super_clusters % (c.clusters // c.super_clusters))
        self.register_buffer("nmi", torch.zeros(()))
        redraw(self._heads(), seed=self._seed)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views["global"][0]  # [B, C, H, W]
        turns = self._turns(batch.index)  # [B], on the CPU
        index = batch.index.to(self.supers.device)
        super_class = turns.to(self.supers.device) * self.config.super_clusters + self.supers[index]  # y, in 0 .. S - 1
        h = self.encoder(rotate90(images.clone(), turns) if self.config.rotations else images)  # [B, D]
        f = functional.relu(h) if self.config.relu else h
        return {
            "h": h,
            "super_scores": self.super_head(f),  # [B, S]
            "super_class": super_class,
            "sub_scores": self.sub_heads(f, super_class),  # [B, k / m]
            "sub_class": self.subs[index],  # z, in 0 .. k / m - 1
        }

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        e = embeddings
        of_super, of_sub = hierarchical_cross_entropy(
            e["super_scores"], e["super_class"], e["sub_scores"], e["sub_class"]
        )
        return {
            "loss": of_super + of_sub,
            "super": of_super.detach(),
            "sub": of_sub.detach(),
            "accuracy/super": (e["super_scores"].detach().argmax(1) == e["super_class"]).float().mean(),
            "accuracy/sub": (e["sub_scores"].detach().argmax(1) == e["sub_class"]).float().mean(),
            "nmi": self.nmi.clone(),
            "z_std": normalised_std(e["h"].detach()),
        }

    def before_step(self, step: Step, pass_over: FeaturePass) -> Iterable[Parameter]:
        self._step = step.step  # `embed`, which turns the images, is not told it
        due = step.starts_epoch and step.epoch % self.config.relabel_epochs == 0
        if not due or self.config.clusters == 1:  # RotNet: nothing to relabel, so the classifier stays
            return ()
        seed = step_seed(self._seed, step.step, 0)
        self._relabel(pass_over, seed, first=step.step == 0)
        # Of one super-cluster only rotations are left to V, and they stay what they are.
        redrawn = self._heads() if self.config.super_clusters > 1 else list(self.sub_heads.parameters())
        redraw(redrawn, seed=seed)
        return redrawn

    def _relabel(self, pass_over: FeaturePass, seed: int, *, first: bool) -> None:
        c, images = self.config, len(self.supers)
        of_each = c.clusters // c.super_clusters
        with evaluating(self.encoder):
            index, x = whitened_pass(pass_over, self.encoder, c.pca_dim, epsilon=c.epsilon, twice=c.two_passes)
        of_top = seed + c.super_clusters  # the second level's seeds begin with DeepCluster's
        start = drawn_rows(x, index, c.super_clusters, seed=of_top)
        top = kmeans(x, start, iterations=c.iterations, seed=of_top, memory=c.memory)
        subs = torch.zeros_like(top.labels)
        for number in top.sizes.nonzero().flatten().tolist():
            own = top.labels == number
            rows = x[own]
            start = drawn_rows(rows, index[own.cpu()], of_each, seed=seed + number)
            subs[own] = kmeans(rows, start, iterations=c.iterations, seed=seed + number, memory=c.memory).labels
        before = self._flat()
        self.supers.copy_(of_all_ranks(top.labels, index, images))
        self.subs.copy_(of_all_ranks(subs, index, images))
        self.nmi.fill_(0.0 if first else normalised_mutual_information(before, self._flat()))

    def sampling_weights(self) -> Tensor | None:
        return None if self.config.clusters == 1 else uniform_over_labels(self._flat())

    def _flat(self) -> Tensor:
        """The cluster of each image among all k: [N]."""
        return self.supers * (self.config.clusters // self.config.super_clusters) + self.subs

    def _turns(self, index: Tensor) -> Tensor:
        """Quarter turns of each image at this step: [B] in 0 .. 3."""
        if not self.config.rotations:
            return torch.zeros_like(index)
        return (uniform(self._seed, self._step, index, ROTATION_STREAM, 1)[:, 0] * TURNS).long()

    def _heads(self) -> list[Parameter]:
        return [*self.super_head.parameters(), *self.sub_heads.parameters()]
