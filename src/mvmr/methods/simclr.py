"""SimCLR: Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual representations",
ICML 2020 (v1); Chen, Kornblith, Swersky, Norouzi, Hinton, "Big self-supervised models are strong semi-supervised
learners", NeurIPS 2020 (v2, of which the deeper head is taken here). Sections and equations are those of the first.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.contrastive import nt_xent
from mvmr.losses.cosine import normalised_std
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.collectives import gather
from mvmr.ops.layers import mlp
from mvmr.types import Batch, Step

Width = Annotated[int, Field(ge=1)]


class SimCLRConfig(MethodConfig):
    """Settings of SimCLR; the defaults are the paper's for ImageNet."""

    name: Literal["simclr"] = "simclr"
    """The method's key."""
    head: Literal["v1", "v2"] = "v1"
    """`v1`: Linear layers with ReLU between them (Section 2.1); `v2`: batch norm after every Linear, the last
    one with a scale and no shift, as in the released code and SimCLR v2."""
    projector: Annotated[tuple[Width, ...], Field(min_length=1)] | None = None
    """Widths of the head's layers; null: the encoder's width in all but the last, which has 128 (Section 2.3): two
    layers in v1, three in v2."""
    temperature: float = Field(0.1, gt=0)
    """tau of Eq. 1: the released commands have 0.1 for ImageNet and 0.5 for CIFAR-10."""
    loss_scale: Literal["paper", "official"] = "paper"
    """`paper`: the mean over all 2B views (Algorithm 1); `official`: the released code's, twice that."""


class SimCLR(Method):
    """NT-Xent (Eq. 1) between two views of every image; all other views of the batch, on all devices, are negatives."""

    Config: ClassVar[type[MethodConfig]] = SimCLRConfig
    summary: ClassVar[str] = "two views agree against all others of the batch (Chen et al., 2020)"
    base_lr: ClassVar[float] = 0.3  # Section 2.3: LARS, 4.8 = 0.3 x batch / 256
    base_optimizer: ClassVar[str] = "lars"

    def __init__(self, encoder: nn.Module, dim: int, config: SimCLRConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        normalised = config.head == "v2"
        widths = config.projector or ((dim, dim, 128) if normalised else (dim, 128))
        self.projector = mlp([dim, *widths], norm=normalised, last_norm="scale" if normalised else "none")

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        # One pass, as in the released code: batch norm sees both views together.
        views = batch.views["global"][:2].flatten(0, 1)  # [2 B, C, H, W]
        first, second = self.projector(self.encoder(views)).chunk(2)  # [B, E] each
        return {"first": first, "second": second}

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        z1, z2 = gather(embeddings["first"]), gather(embeddings["second"])  # [W B, E] each
        loss, accuracy = nt_xent(z1, z2, temperature=self.config.temperature)  # Eq. 1, Algorithm 1
        if self.config.loss_scale == "official":
            loss = 2 * loss
        return {"loss": loss, "accuracy": accuracy, "z_std": normalised_std(z1)}
