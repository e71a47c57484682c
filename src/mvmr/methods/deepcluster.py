"""DeepCluster: Caron, Bojanowski, Joulin, Douze, "Deep clustering for unsupervised learning of visual features", ECCV
2018. Sections and equations are numbered as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter, functional

from mvmr.losses.clustering import cluster_cross_entropy
from mvmr.losses.cosine import normalised_std
from mvmr.methods.base import Method, MethodConfig, check_clusters
from mvmr.ops.kmeans import drawn_rows, kmeans
from mvmr.ops.labels import normalised_mutual_information, of_all_ranks, uniform_over_labels
from mvmr.ops.layers import redraw
from mvmr.ops.modes import evaluating
from mvmr.ops.random import step_seed
from mvmr.ops.whitening import whitened_pass
from mvmr.types import Batch, FeaturePass, Step


class DeepClusterConfig(MethodConfig):
    """Settings of DeepCluster; the defaults are the paper's for ImageNet."""

    needs: ClassVar[Mapping[str, int]] = {"global": 1}

    name: Literal["deepcluster"] = "deepcluster"
    """The method's key."""
    clusters: int = Field(10_000, ge=2)
    """k, the number of clusters (Section 4.1)."""
    pca_dim: int = Field(256, ge=1)
    """Principal components that are clustered, whitened (Section 3.4); all of them where the encoder has fewer."""
    iterations: int = Field(20, ge=1)
    """Moves of the centroids at each relabelling, from random images (released code)."""
    relabel_epochs: int = Field(1, ge=1)
    """Epochs between two relabellings (Section 3.4)."""
    relu: bool = True
    """ReLU between the encoder and the classifier, but not before k-means: alexnet and vgg16 end before theirs, as in
    the released code. Nothing changes for a ResNet, whose features are not negative."""
    official_positions: bool = False
    """Draw images as the released code does: it draws image numbers uniformly over clusters, but takes them for places
    in a list sorted by cluster. False: uniformly over clusters (Section 3.3)."""
    two_passes: bool = False
    """Compute all features twice, so that only their principal components are ever held."""
    memory: int = Field(64, ge=1)
    """MiB of working space of k-means."""


class DeepCluster(Method):
    """The encoder's features are clustered, and a classifier on top of it learns to tell the clusters."""

    Config: ClassVar[type[MethodConfig]] = DeepClusterConfig
    summary: ClassVar[str] = "classes are k-means clusters of its own features, anew each epoch (Caron et al., 2018)"
    base_lr: ClassVar[float] = 0.05  # released code
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # the classes change, and the classifier with them

    labels: Tensor
    nmi: Tensor
    largest: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: DeepClusterConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.head = nn.Linear(dim, config.clusters)
        self._seed = 0

    def prepare(self, images: int) -> None:
        check_clusters("method.clusters", self.config.clusters, images)
        self._seed = int(torch.randint(1 << 62, ()))
        self.register_buffer("labels", torch.arange(images) % self.config.clusters)
        self.register_buffer("nmi", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))
        redraw(self.head.parameters(), seed=self._seed)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        h = self.encoder(batch.views["global"][0])  # [B, D]
        return {"h": h, "scores": self.head(functional.relu(h) if self.config.relu else h)}  # [B, K]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        labels = self.labels[batch.index.to(self.labels.device)]  # [B]
        scores = embeddings["scores"]
        return {
            "loss": cluster_cross_entropy(scores, labels),  # Eq. 1
            "accuracy": (scores.detach().argmax(1) == labels).float().mean(),
            "nmi": self.nmi.clone(),
            "largest": self.largest.clone(),
            "z_std": normalised_std(embeddings["h"].detach()),
        }

    def before_step(self, step: Step, pass_over: FeaturePass) -> Iterable[Parameter]:
        if not step.starts_epoch or step.epoch % self.config.relabel_epochs:
            return ()
        seed = step_seed(self._seed, step.step, 0)
        self._relabel(pass_over, seed, first=step.step == 0)
        redraw(self.head.parameters(), seed=seed)  # the new clusters are numbered in another order
        return list(self.head.parameters())

    def _relabel(self, pass_over: FeaturePass, seed: int, *, first: bool) -> None:
        c = self.config
        with evaluating(self.encoder):
            index, x = whitened_pass(pass_over, self.encoder, c.pca_dim, twice=c.two_passes)
        start = drawn_rows(x, index, c.clusters, seed=seed)
        found = kmeans(x, start, iterations=c.iterations, seed=seed, memory=c.memory)  # Eq. 2
        labels = of_all_ranks(found.labels, index, len(self.labels))
        self.nmi.fill_(0.0 if first else normalised_mutual_information(self.labels, labels))  # Section 4.1
        self.largest.fill_(float(found.sizes.max() / len(labels)))
        self.labels.copy_(labels)

    def sampling_weights(self) -> Tensor:
        return uniform_over_labels(self.labels, official_positions=self.config.official_positions)

    def parameter_groups(self) -> list[dict]:
        # As in the released code: the classifier, which never lives long, has no momentum.
        encoder = [p for p in self.encoder.parameters() if p.requires_grad]
        return [{"params": encoder}, {"params": list(self.head.parameters()), "momentum": 0.0}]
