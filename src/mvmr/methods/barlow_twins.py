"""Barlow Twins: Zbontar, Jing, Misra, LeCun, Deny, "Barlow Twins: self-supervised learning via redundancy reduction",
ICML 2021. Equations and sections are numbered as there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.cosine import normalised_std
from mvmr.losses.decorrelation import cross_correlation
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.collectives import gather
from mvmr.ops.layers import mlp
from mvmr.types import Batch, Step

Width = Annotated[int, Field(ge=1)]


class BarlowTwinsConfig(MethodConfig):
    """Settings of Barlow Twins; the defaults are the paper's, but for lambda's second digit."""

    name: Literal["barlow_twins"] = "barlow_twins"
    """The method's key."""
    projector: tuple[Width, ...] = Field((8192, 8192, 8192), min_length=1)
    """Widths of the projector's layers (Section 2.2, architecture)."""
    redundancy: float = Field(0.0051, ge=0)
    """lambda of Eq. 1, the weight of the off-diagonal elements: the released code's, 0.005 in Section 2.2."""
    epsilon: float = Field(1e-5, gt=0)
    """Added to the variances of Eq. 2: that of batch norm, by which the released code standardises."""
    scale: float = Field(1.0, gt=0)
    """Multiplies the loss; solo-learn's CIFAR settings have 0.1. LARS cancels it, but for biases and norms."""
    bias_lr_scale: float = Field(0.00075, gt=0)
    """Rate of biases and norms as a share of the weights', 0.0048 / 0.2 (Section 2.2); 1 suits adam and sgd. The
    released code's gradient is divided by the number of GPUs, which makes it 0.00075 on the paper's 32."""


class BarlowTwins(Method):
    """Barlow Twins' L (Eq. 1): the two views' embeddings correlate dimension by dimension, and no further."""

    Config: ClassVar[type[MethodConfig]] = BarlowTwinsConfig
    summary: ClassVar[str] = (
        "the cross-correlation of two views' embeddings becomes the identity (Zbontar et al., 2021)"
    )
    base_lr: ClassVar[float] = 0.2  # Section 2.2: LARS, 0.2 x batch / 256 for the weights
    base_optimizer: ClassVar[str] = "lars"

    def __init__(self, encoder: nn.Module, dim: int, config: BarlowTwinsConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.projector = mlp([dim, *config.projector])

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        # Two passes: batch norm sees the two views apart.
        first, second = batch.views["global"][0], batch.views["global"][1]  # [B, C, H, W]
        return {
            "first": self.projector(self.encoder(first)),  # [B, E]
            "second": self.projector(self.encoder(second)),  # [B, E]
        }

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        c = self.config
        z1, z2 = gather(embeddings["first"]), gather(embeddings["second"])  # [W B, E]
        diagonal, redundancy = cross_correlation(z1, z2, epsilon=c.epsilon)  # Eq. 2: c_ii [E], sum of c_ij^2
        invariance = (1 - diagonal).square().sum()
        loss = c.scale * (invariance + c.redundancy * redundancy)  # Eq. 1

        pairs = max(1, len(diagonal) * (len(diagonal) - 1))
        terms = {
            "invariance": invariance,
            "redundancy": redundancy,
            "correlation/views": diagonal.mean(),
            "correlation/dimensions": (redundancy / pairs).clamp(min=0).sqrt(),  # root mean square
            "z_std": normalised_std(z1),
        }
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def parameter_groups(self) -> list[dict]:
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "lr_scale": self.config.bias_lr_scale},
        ]
