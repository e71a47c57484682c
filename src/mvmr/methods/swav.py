"""SwAV: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised learning of visual features by contrasting
cluster assignments", NeurIPS 2020. Sections and equations are numbered as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.cosine import normalised_std
from mvmr.losses.swapped import code_terms, swapped_prediction
from mvmr.methods.base import Method, MethodConfig
from mvmr.nets.codes import ClusterPrototypes, CodeMaker
from mvmr.nets.multicrop import encode_views
from mvmr.ops.collectives import gather
from mvmr.ops.layers import mlp
from mvmr.ops.unit import unit
from mvmr.types import Batch, Step


class SwAVConfig(MethodConfig):
    """Settings of SwAV; the defaults are those of the authors' runs with a batch of 256."""

    needs: ClassVar[Mapping[str, int]] = {"global": 2, "local": 0}

    name: Literal["swav"] = "swav"
    """The method's key."""
    hidden: int = Field(2048, ge=1)
    """Width of the projector's hidden layer, with batch norm (Appendix A.1); 8192 for the wide ResNets."""
    dim: int = Field(128, ge=1)
    """Width of the embedding z (Appendix A.1)."""
    prototypes: int = Field(3000, ge=2)
    """K of Section 3.1 (Appendix A.1)."""
    temperature: float = Field(0.1, gt=0)
    """tau of Eq. 2 (Appendix A.1)."""
    epsilon: float = Field(0.05, gt=0)
    """epsilon of Eq. 3 (Appendix A.1); 0.03 where the loss stays at ln K (README)."""
    sinkhorn_iterations: int = Field(3, ge=1)
    """Iterations towards Eq. 5 (Section 3.1)."""
    queue: int = Field(3840, ge=0)
    """Past images that take part in the codes of a small batch (Sections 3.1 and 4.3); 0: none, for a batch of 4096."""
    queue_epoch: int = Field(15, ge=0)
    """The epoch in which the queue begins to fill (Section 4.3, released code); it is used once it is full."""
    freeze_prototypes_epochs: int = Field(1, ge=0)
    """Epochs at the start in which the prototypes stay as drawn (Appendix A.1, released code)."""


class SwAV(Method):
    """Views of an image predict each other's cluster codes, which are dealt out evenly over the batch."""

    Config: ClassVar[type[MethodConfig]] = SwAVConfig
    summary: ClassVar[str] = "a view's evenly dealt cluster code predicted from the other views (Caron et al., 2020)"
    base_lr: ClassVar[float] = 0.3  # Appendix A.1: LARS, 4.8 at a batch of 4096; with a queue at 256 it is 0.6
    base_optimizer: ClassVar[str] = "lars"

    def __init__(self, encoder: nn.Module, dim: int, config: SwAVConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.projector = mlp([dim, config.hidden, config.dim], bias=True)
        self.prototypes = ClusterPrototypes(config.dim, config.prototypes)
        self.codes = CodeMaker(
            config.dim, size=config.queue, epsilon=config.epsilon, iterations=config.sinkhorn_iterations
        )
        self._pending: list[Tensor] = []  # embeddings of batches whose optimiser step is still to come

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        small = [batch.views["local"]] if "local" in batch.views else []  # [V - 2, B, C, h, w]
        features = encode_views(self.encoder, [batch.views["global"][:2], *small])  # [V, B, D]
        # As in the released code: the encoder once for each size, the head once for all views.
        z = unit(self.projector(features.flatten(0, 1)))
        return {"z": z.unflatten(0, features.shape[:2]).transpose(0, 1)}  # [B, V, E]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        z = embeddings["z"]  # [B, V, E], the two large crops first
        codes = self.codes(z[:, :2].detach(), self.prototypes)  # q of Eq. 5, [B, 2, K]
        scores = self.prototypes(z)  # [B, V, K]
        loss = swapped_prediction(scores, codes, temperature=self.config.temperature)  # Eqs. 2 and 6
        if self.config.queue and step.epoch >= self.config.queue_epoch:
            self._pending.append(gather(z[:, :2].detach()))
        return {"loss": loss, **code_terms(scores, codes, self.config.temperature), "z_std": normalised_std(z[:, 0])}

    def after_backward(self, step: Step) -> None:
        if step.epoch < self.config.freeze_prototypes_epochs:
            self.prototypes.weight.grad = None  # not zero, which momentum and weight decay would still move

    def after_step(self, step: Step) -> None:
        self.prototypes.renormalise()  # the released code does it before the next forward pass
        for z in self._pending:
            self.codes.push(z)
        self._pending.clear()
