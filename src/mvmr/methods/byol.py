"""BYOL: Grill, Strub, Altche, Tallec, Richemond et al., "Bootstrap your own latent: a new approach to self-supervised
learning", NeurIPS 2020. Equations, sections and tables are numbered as there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.cosine import negative_cosine, normalised_distance, normalised_std
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.ema import follow, follower
from mvmr.ops.layers import mlp
from mvmr.ops.schedules import cosine
from mvmr.types import Batch, Step

Width = Annotated[int, Field(ge=1)]


class BYOLConfig(MethodConfig):
    """Settings of BYOL; the defaults are the paper's for 1000 epochs."""

    name: Literal["byol"] = "byol"
    """The method's key."""
    projector: tuple[Width, ...] = Field((4096, 256), min_length=1)
    """Widths of the projector's layers (Section 3.3); the last one is also the predictor's output."""
    predictor_hidden: int = Field(4096, ge=1)
    """Width inside the predictor, which is built as the projector (Section 3.3)."""
    momentum: float = Field(0.996, ge=0, le=1)
    """tau_base (Section 3.3): what the target keeps of itself at the first step; 0.99 for 100 and 300 epochs."""
    final_momentum: float = Field(1.0, ge=0, le=1)
    """tau at the last step (Section 3.3), reached along a half cosine; equal to momentum: constant."""


class BYOL(Method):
    """BYOL's loss (Eq. 2) in both directions: each view's online prediction against the other view's target."""

    Config: ClassVar[type[MethodConfig]] = BYOLConfig
    summary: ClassVar[str] = "a slowly moving target's projection predicted, without negatives (Grill et al., 2020)"
    base_lr: ClassVar[float] = 0.2  # Section 3.3: LARS, 0.2 x batch / 256, for 1000 epochs
    base_optimizer: ClassVar[str] = "lars"
    loss_is_progress: ClassVar[bool] = False  # what is predicted moves too, and grows harder as it spreads

    def __init__(self, encoder: nn.Module, dim: int, config: BYOLConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        # Section 3.3: Linear, BN, ReLU, and a last Linear without BN; a bias before BN would change nothing.
        self.projector = mlp([dim, *config.projector])
        width = config.projector[-1]
        self.predictor = mlp([width, config.predictor_hidden, width])
        self.target_encoder = follower(self.encoder)
        self.target_projector = follower(self.projector)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        # Each view passes alone through each network; the target too has the batch statistics of its own passes.
        first, second = batch.views["global"][0], batch.views["global"][1]  # [B, C, H, W]
        with torch.no_grad():
            target1 = self.target_projector(self.target_encoder(first))  # [B, E]
            target2 = self.target_projector(self.target_encoder(second))
        return {
            "prediction1": self.predictor(self.projector(self.encoder(first))),  # [B, E]
            "prediction2": self.predictor(self.projector(self.encoder(second))),
            "target1": target1,
            "target2": target2,
        }

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        q1, q2 = embeddings["prediction1"], embeddings["prediction2"]  # [B, E]
        z1, z2 = embeddings["target1"].detach(), embeddings["target2"].detach()
        # A mean over images, so nothing is gathered: the mean over ranks is the loss of the whole batch.
        loss = normalised_distance(q1, z2) + normalised_distance(q2, z1)  # Eq. 2 and its mirror image, in [0, 8]
        return {"loss": loss, "cosine/views": -negative_cosine(z1, z2), "z_std": normalised_std(z1)}

    def after_step(self, step: Step) -> None:
        tau = self.momentum_at(step)
        follow(self.target_encoder, self.encoder, tau)  # xi <- tau xi + (1 - tau) theta (Eq. 1)
        follow(self.target_projector, self.projector, tau)

    def momentum_at(self, step: Step) -> float:
        """1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 (Section 3.3), with k / K = 1 at the last step."""
        return cosine(step.step, step.total_steps, self.config.momentum, self.config.final_momentum)
