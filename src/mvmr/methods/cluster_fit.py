"""ClusterFit: Yan, Misra, Gupta, Ghadiyaram, Mahajan, "ClusterFit: improving generalization of visual representations",
CVPR 2020; the same as cluster classification, CC: Noroozi, Vinjimoor, Favaro, Pirsiavash, "Boosting self-supervised
learning via knowledge transfer", CVPR 2018. Sections are those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter, functional

from mvmr.losses.cosine import normalised_std
from mvmr.losses.self_distillation import entropy
from mvmr.methods.base import DistillationConfig, Method, check_clusters
from mvmr.ops.kmeans import drawn_rows, kmeans
from mvmr.ops.labels import of_all_ranks
from mvmr.ops.precision import at_least_float32
from mvmr.ops.random import permutation
from mvmr.types import Batch, FeaturePass, Step


class ClusterFitConfig(DistillationConfig):
    """Settings of ClusterFit; the defaults are its released code's for ImageNet."""

    name: Literal["cluster_fit"] = "cluster_fit"
    """The method's key."""
    clusters: int = Field(16000, ge=2)
    """K, clusters of the teacher's embeddings (Section 3; released code, and CompRess's script for CC)."""
    iterations: int = Field(50, ge=1)
    """Moves of k-means' centroids, at most (CompRess's code for CC: 20)."""
    normalise: bool = False
    """True brings the embeddings to norm 1 before they are clustered (CompRess's code for CC)."""

    def fitted(self, width: Callable[[str], int], sides: Sequence[int] = ()) -> ClusterFitConfig:
        return self  # no layer has the teacher's width, so the teacher is not asked for it


class ClusterFit(Method):
    """A new network learns, from scratch, to classify images into clusters of a frozen teacher's embeddings."""

    Config: ClassVar[type[DistillationConfig]] = ClusterFitConfig
    summary: ClassVar[str] = "clusters of a frozen teacher's embeddings as classes (Noroozi, 2018; Yan et al., 2020)"
    base_lr: ClassVar[float] = 0.1  # released code: SGD, batch 256
    base_optimizer: ClassVar[str] = "sgd"

    labels: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: ClusterFitConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.head = nn.Linear(dim, config.clusters)
        self._seed = int(torch.randint(2**31, ()))  # of the run's seed, so equal on all ranks

    def prepare(self, images: int) -> None:
        """Labels [N]; random ones of equal shares until the first step clusters the embeddings."""
        check_clusters("method.clusters", self.config.clusters, images)
        self.register_buffer("labels", permutation(self._seed, 0, images).remainder(self.config.clusters))

    def exported(self) -> nn.Module:
        return self.encoder

    def before_step(self, step: Step, pass_over: FeaturePass) -> Iterable[Parameter]:
        if step.step == 0:
            index, rows = pass_over.representation(self.config.teacher)  # this rank's [n], [n, F]
            if self.config.normalise:
                rows = functional.normalize(rows, dim=1)
            start = drawn_rows(rows, index, self.config.clusters, seed=self._seed)  # [K, F]
            found = kmeans(rows, start, iterations=self.config.iterations, seed=self._seed)
            self.labels.copy_(of_all_ranks(found.labels, index, len(self.labels)))
        return ()

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        features = self.encoder(batch.views["global"][0])  # [B, D]
        return {"features": features, "logits": self.head(features)}  # [B, K]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        logits = at_least_float32(embeddings["logits"])  # [B, K]
        labels = self.labels[batch.index.to(logits.device)]  # [B]
        loss = functional.cross_entropy(logits, labels)  # Section 3; a mean over images
        accuracy = (logits.detach().argmax(1) == labels).to(loss.dtype).mean()
        spread = entropy(logits.detach().softmax(1).mean(0))
        terms = {"accuracy": accuracy, "entropy/mean": spread, "z_std": normalised_std(embeddings["features"])}
        return {"loss": loss, **terms}
