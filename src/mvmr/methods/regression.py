"""Reg and Reg-BN, the regressions that CompRess is compared with: Yu, Yazici, Liu, van de Weijer, Cheng, Ramisa,
"Learning metrics from teachers: compact networks for image embedding", CVPR 2019 (Reg); Koohpayegani, Tejankar,
Pirsiavash, "CompRess", NeurIPS 2020 (Reg-BN).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from mvmr.losses.cosine import negative_cosine, normalised_std
from mvmr.losses.similarity_distillation import regression
from mvmr.methods.base import DistillationConfig, Method
from mvmr.ops.collectives import gather
from mvmr.types import Batch, Step


class RegressionConfig(DistillationConfig):
    """Settings of Reg and Reg-BN."""

    name: Literal["regression"] = "regression"
    """The method's key."""
    batch_norm: bool = False
    """False: Reg. True: Reg-BN, where batch norm without parameters first standardises both embeddings."""


class Regression(Method):
    """A linear map of the student's features is brought near the teacher's embedding."""

    Config: ClassVar[type[DistillationConfig]] = RegressionConfig
    summary: ClassVar[str] = "a frozen teacher's embedding regressed by a linear head (Yu et al., 2019)"
    base_lr: ClassVar[float] = 0.01  # that of CompRess, whose tables have both
    base_optimizer: ClassVar[str] = "sgd"

    def __init__(self, encoder: nn.Module, dim: int, config: RegressionConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        # Batch norm takes a bias away again, which would get no gradient.
        self.head = nn.Linear(dim, config.width, bias=not config.batch_norm)

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {"student": self.head(self.encoder(batch.views["global"][0]))}  # [B, F]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        s, t = embeddings["student"], batch.representations[self.config.teacher]  # [B, F]
        if self.config.batch_norm:  # its statistics are of the batch of all devices; the plain distance needs no others
            s, t = gather(s), gather(t)  # [W B, F]
        loss = regression(s, t, batch_norm=self.config.batch_norm)
        # What the teacher's mean, as a prediction, would cost.
        worst = t.new_ones(()) if self.config.batch_norm else t.var(0, correction=0).mean()
        terms = {
            "explained": 1 - loss / worst.clamp(min=1e-12),
            "cosine": -negative_cosine(s, t),
            "z_std": normalised_std(s),
        }
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}
