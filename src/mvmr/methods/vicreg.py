"""VICReg: Bardes, Ponce, LeCun, "VICReg: variance-invariance-covariance regularization for self-supervised learning",
ICLR 2022. Equations, sections and Algorithm 1 are numbered as there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mvmr.losses import invariance, variance_hinge
from mvmr.losses.cosine import normalised_std
from mvmr.losses.decorrelation import covariance_penalty
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.collectives import gather
from mvmr.ops.layers import mlp
from mvmr.types import Batch, Step

Width = Annotated[int, Field(ge=1)]


class VICRegConfig(MethodConfig):
    """Settings of VICReg; the defaults are those of the paper's Algorithm 1."""

    name: Literal["vicreg"] = "vicreg"
    """The method's key."""
    expander: tuple[Width, ...] = Field((8192, 8192, 8192), min_length=1)
    """Widths of the expander's layers (Section 4.2)."""
    invariance: float = Field(25.0, ge=0)
    """lambda of Eq. 6, the weight of the distance between the two embeddings (Section 4.2)."""
    variance: float = Field(25.0, ge=0)
    """mu of Eq. 6, the weight of the two variance hinges (Section 4.2)."""
    covariance: float = Field(1.0, ge=0)
    """nu of Eq. 6, the weight of the two covariance terms (Section 4.2)."""
    gamma: float = 1.0
    """Target standard deviation of the hinge (Eq. 1)."""
    variance_epsilon: float = Field(1e-4, ge=0)
    """epsilon of Eq. 2, inside the square root (Section 4.2)."""
    mse_reduction: Literal["mean", "sum"] = "mean"
    """`mean`: over images and dimensions, as Algorithm 1 and the released code; `sum`: over dimensions (Eq. 5)."""
    halve_variance: bool = False
    """True takes half of each hinge, as the released code does; Eq. 6 and Algorithm 1 add the two up."""


class VICReg(Method):
    """VICReg's loss (Eq. 6): variance and covariance of each view's embeddings, and the distance between the views."""

    Config: ClassVar[type[MethodConfig]] = VICRegConfig
    summary: ClassVar[str] = "views meet while dimensions keep their spread and decorrelate (Bardes et al., 2022)"
    base_lr: ClassVar[float] = 0.2  # Section 4.2: LARS, 0.2 x batch / 256
    base_optimizer: ClassVar[str] = "lars"

    def __init__(self, encoder: nn.Module, dim: int, config: VICRegConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.expander = mlp([dim, *config.expander], bias=True, last_bias=False)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        # Two passes: batch norm sees the two views apart.
        first, second = batch.views["global"][0], batch.views["global"][1]  # [B, C, H, W]
        return {
            "first": self.expander(self.encoder(first)),  # [B, E]
            "second": self.expander(self.encoder(second)),  # [B, E]
        }

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        c = self.config
        z1, z2 = gather(embeddings["first"]), gather(embeddings["second"])  # [W B, E]
        distance = invariance(z1, z2, reduction=c.mse_reduction)  # Eq. 5
        v1, v2 = (variance_hinge(z, gamma=c.gamma, epsilon=c.variance_epsilon) for z in (z1, z2))  # Eqs. 1, 2
        variance = (v1 + v2) / 2 if c.halve_variance else v1 + v2
        covariance = covariance_penalty(z1) + covariance_penalty(z2)  # Eqs. 3, 4
        loss = c.invariance * distance + c.variance * variance + c.covariance * covariance  # Eq. 6

        terms = {"invariance": distance, "variance": variance, "covariance": covariance, "z_std": normalised_std(z1)}
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}
