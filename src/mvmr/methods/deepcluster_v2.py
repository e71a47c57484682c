"""DeepCluster-v2: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised learning of visual features by
contrasting cluster assignments", NeurIPS 2020, which compares it with SwAV. The details are those of its released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter, functional

from mvmr.losses.clustering import prototype_cross_entropy
from mvmr.losses.cosine import normalised_std
from mvmr.methods.base import Method, MethodConfig, check_clusters
from mvmr.nets.multicrop import encode_views
from mvmr.ops.collectives import all_reduce_sum, gather, rank, world_size
from mvmr.ops.kmeans import drawn_rows, kmeans
from mvmr.ops.labels import normalised_mutual_information, of_all_ranks
from mvmr.ops.layers import mlp
from mvmr.ops.modes import seeded
from mvmr.ops.random import step_seed
from mvmr.ops.unit import unit
from mvmr.types import Batch, FeaturePass, Step

BANKS = 2
"""Views of an image whose embeddings are kept and clustered."""


class DeepClusterV2Config(MethodConfig):
    """Settings of DeepCluster-v2; the defaults are those of the released commands."""

    needs: ClassVar[Mapping[str, int]] = {"global": 2, "local": 0}

    name: Literal["deepcluster_v2"] = "deepcluster_v2"
    """The method's key."""
    hidden: int = Field(2048, ge=1)
    """Width of the projection head's hidden layer."""
    dim: int = Field(128, ge=1)
    """D, the width of what is clustered."""
    prototypes: tuple[Annotated[int, Field(ge=2)], ...] = Field((3000, 3000, 3000), min_length=1)
    """Clusters of each of several clusterings, which are told independently."""
    temperature: float = Field(0.1, gt=0)
    """Divides the cosines between embeddings and centroids."""
    iterations: int = Field(10, ge=1)
    """Moves of the centroids at each relabelling, from random embeddings."""
    relabel_epochs: int = Field(1, ge=1)
    """Epochs between two relabellings."""
    memory: int = Field(64, ge=1)
    """MiB of working space of k-means."""


class DeepClusterV2(Method):
    """Every view tells the cluster of its image, found in last epoch's embeddings; the centroids are the classifier."""

    Config: ClassVar[type[MethodConfig]] = DeepClusterV2Config
    summary: ClassVar[str] = "every view tells the cluster of last epoch's embedding of its image (Caron et al., 2020)"
    base_lr: ClassVar[float] = 0.3  # the released commands' 4.8 at a batch of 4096, with LARS
    base_optimizer: ClassVar[str] = "lars"
    loss_is_progress: ClassVar[bool] = False  # the clusters change every epoch

    bank: Tensor
    labels: Tensor
    nmi: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: DeepClusterV2Config):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.projector = mlp([dim, config.hidden, config.dim], bias=True)
        self._seed = 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def prepare(self, images: int) -> None:
        counts = self.config.prototypes
        check_clusters("the largest of method.prototypes", max(counts), images)
        self._seed = int(torch.randint(1 << 62, ()))
        # Prototypes are centroids, which no gradient moves.
        for head, count in enumerate(counts):
            self.register_buffer(f"prototypes{head}", functional.normalize(torch.randn(count, self.config.dim), dim=1))
        self.register_buffer("bank", torch.zeros(BANKS, images, self.config.dim))
        self.register_buffer("labels", torch.stack([torch.arange(images) % count for count in counts]))
        self.register_buffer("nmi", torch.zeros(()))

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        streams = [batch.views[name] for name in ("global", "local") if name in batch.views]  # [V, B, C, H, W] each
        h = encode_views(self.encoder, streams)  # [all V, B, D]
        z = self._projected(h.flatten(0, 1))  # one pass of the head for all views, as in the released code
        return {"z": z.unflatten(0, h.shape[:2]).transpose(0, 1)}  # [B, V, D]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        z = embeddings["z"]
        index = batch.index.to(z.device)
        losses, accuracies = [], []
        for prototypes, labels in zip(self._prototypes(), self.labels[:, index], strict=True):  # [K, D], [B]
            losses.append(prototype_cross_entropy(z, prototypes, labels, temperature=self.config.temperature))
            nearest = (z[:, 0].detach() @ prototypes.to(z.dtype).T).argmax(1)
            accuracies.append((nearest == labels).float().mean())
        self._pending.append((gather(index), gather(z[:, :BANKS].detach().contiguous())))
        return {
            "loss": torch.stack(losses).mean(),
            "accuracy": torch.stack(accuracies).mean(),
            "nmi": self.nmi.clone(),
            "z_std": normalised_std(z[:, 0].detach()),
        }

    def after_step(self, step: Step) -> None:
        for index, z in self._pending:
            self.bank[:, index] = z.transpose(0, 1).to(self.bank.dtype)
        self._pending.clear()

    def before_step(self, step: Step, pass_over: FeaturePass) -> Iterable[Parameter]:
        if step.step == 0:
            self._fill(pass_over)
        if step.starts_epoch and step.epoch % self.config.relabel_epochs == 0:
            self._relabel(step)
        return ()

    def _fill(self, pass_over: FeaturePass) -> None:
        """The bank before the first epoch, of plain images, with the batch statistics that training has too."""
        with seeded(step_seed(self._seed, 0, rank()), self.bank.device):  # dropout's and dropped paths' draws
            index, z = pass_over(lambda images: self._projected(self.encoder(images)))
        self.bank.zero_()
        self.bank[:, index.to(self.bank.device)] = z.to(self.bank)
        self.bank.copy_(all_reduce_sum(self.bank))

    def _relabel(self, step: Step) -> None:
        c, images = self.config, self.bank.shape[1]
        index = torch.arange(rank(), images, world_size())  # this rank's share of the work
        agreement = []
        for head, prototypes in enumerate(self._prototypes()):
            x = self.bank[head % BANKS, index.to(self.bank.device)]  # [n, D]
            start = drawn_rows(x, index, len(prototypes), seed=step_seed(self._seed, step.step, head))
            # Clusters that lose all members keep their centroid, and may win some back.
            found = kmeans(x, start, iterations=c.iterations, spherical=True, empty="keep", memory=c.memory)
            labels = of_all_ranks(found.labels, index, images)
            agreement.append(normalised_mutual_information(self.labels[head], labels))
            prototypes.copy_(found.centroids)
            self.labels[head] = labels
        self.nmi.fill_(sum(agreement) / len(agreement) if step.step else 0.0)

    def _projected(self, h: Tensor) -> Tensor:
        return unit(self.projector(h))

    def _prototypes(self) -> list[Tensor]:
        return [self.get_buffer(f"prototypes{head}") for head in range(len(self.config.prototypes))]
