"""SimSiam: Chen and He, "Exploring simple Siamese representation learning", CVPR 2021. Equations, sections and tables
are numbered as there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.cosine import negative_cosine, normalised_std
from mvmr.methods.base import Method, MethodConfig
from mvmr.ops.layers import mlp
from mvmr.types import Batch, Step

Width = Annotated[int, Field(ge=1)]


class SimSiamConfig(MethodConfig):
    """Settings of SimSiam; the defaults are the paper's."""

    name: Literal["simsiam"] = "simsiam"
    """The method's key."""
    projector: tuple[Width, ...] = Field((2048, 2048, 2048), min_length=1)
    """Widths of the projector's layers (Section 3); two layers, (2048, 2048), for CIFAR-10 (Appendix D)."""
    predictor_hidden: int = Field(512, ge=1)
    """Width inside the predictor, a quarter of its output: a bottleneck (Section 3)."""
    constant_predictor_lr: bool = True
    """True keeps the predictor's rate at its peak (Table 1's last row, the released command); False: Section 3."""


class SimSiam(Method):
    """SimSiam's loss (Eq. 4): each view's prediction against the other view's projection, whose gradient is stopped."""

    Config: ClassVar[type[MethodConfig]] = SimSiamConfig
    summary: ClassVar[str] = "one network predicts its own projection, with a stop-gradient (Chen and He, 2021)"
    base_lr: ClassVar[float] = 0.05  # Section 3: SGD, 0.05 x batch / 256
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # it is least where all embeddings are one

    def __init__(self, encoder: nn.Module, dim: int, config: SimSiamConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        # Section 3: BN on every layer, the output's too, there without scale and shift as in the released code.
        self.projector = mlp([dim, *config.projector], last_norm="plain")
        # Section 3: BN inside, none on the output, where it would make the training unstable (Table 3).
        width = config.projector[-1]
        self.predictor = mlp([width, config.predictor_hidden, width], last_bias=True)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        # Two passes: batch norm sees the two views apart.
        first, second = batch.views["global"][0], batch.views["global"][1]  # [B, C, H, W]
        z1, z2 = self.projector(self.encoder(first)), self.projector(self.encoder(second))  # [B, E]
        return {
            "projection1": z1,
            "projection2": z2,
            "prediction1": self.predictor(z1),  # [B, E]
            "prediction2": self.predictor(z2),
        }

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        p1, p2 = embeddings["prediction1"], embeddings["prediction2"]  # [B, E]
        z1, z2 = embeddings["projection1"].detach(), embeddings["projection2"].detach()  # the stop-gradient
        # A mean over images, so nothing is gathered: the mean over ranks is the loss of the whole batch.
        loss = negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2  # Eq. 4, in [-1, 1]
        return {"loss": loss, "cosine/views": -negative_cosine(z1, z2), "z_std": normalised_std(z1)}

    def parameter_groups(self) -> list[dict]:
        rest = [*self.encoder.parameters(), *self.projector.parameters()]
        return [
            {"params": [p for p in rest if p.requires_grad]},
            {"params": list(self.predictor.parameters()), "constant_lr": self.config.constant_predictor_lr},
        ]
