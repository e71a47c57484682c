"""DINO: Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, "Emerging properties in self-supervised vision
transformers", ICCV 2021. Sections and equations are numbered as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.self_distillation import entropy, self_distillation, sharpened
from mvmr.methods.base import Method, MethodConfig
from mvmr.nets.prototypes import Prototypes
from mvmr.ops.collectives import all_reduce_sum, world_size
from mvmr.ops.ema import follow, follower
from mvmr.ops.layers import mlp
from mvmr.ops.precision import at_least_float32
from mvmr.ops.schedules import cosine, linear
from mvmr.ops.unit import unit
from mvmr.types import Batch, Step


class DINOConfig(MethodConfig):
    """Settings of DINO; the defaults are the paper's for ViT-S/16."""

    needs: ClassVar[Mapping[str, int]] = {"global": 2, "local": 0}

    name: Literal["dino"] = "dino"
    """The method's key."""
    hidden: int = Field(2048, ge=1)
    """Width of the head's two hidden layers (Section 3.1)."""
    bottleneck: int = Field(256, ge=1)
    """Width that is L2-normalised before the last layer (Section 3.1, Appendix C)."""
    prototypes: int = Field(65536, ge=2)
    """K, the head's output dimension (Section 3.1, Appendix C)."""
    head_batch_norm: bool = False
    """Batch norm in the head's hidden layers; the paper has none, so that with a ViT DINO is free of it."""
    norm_last_layer: bool = True
    """True keeps the last layer's rows at norm 1; False learns their norms, which the authors advise for ViT-S only."""
    student_temperature: float = Field(0.1, gt=0)
    """tau_s of Eq. 1 (Section 3.2)."""
    teacher_temperature: float = Field(0.07, gt=0)
    """tau_t after its warm-up (Section 3.2); the released code's default is 0.04 throughout."""
    warmup_teacher_temperature: float = Field(0.04, gt=0)
    """tau_t in the first epoch (Section 3.2)."""
    temperature_epochs: int = Field(30, ge=0)
    """Epochs over which tau_t rises linearly, epoch by epoch (Section 3.2); 0: `teacher_temperature` throughout."""
    centre_momentum: float = Field(0.9, ge=0, le=1)
    """m of Eq. 4, the centre's moving average."""
    momentum: float = Field(0.996, ge=0, le=1)
    """lambda, the teacher's moving average, at the first step (Section 3.1); 0.9995 is advised for a batch of 256."""
    final_momentum: float = Field(1.0, ge=0, le=1)
    """lambda at the last step, reached along a half cosine (Section 3.1)."""
    freeze_last_layer_epochs: int = Field(1, ge=0)
    """Epochs at the start in which the last layer stays as drawn (released code)."""


class DINO(Method):
    """A student that predicts, from every crop of an image, what its own moving average says of the large crops."""

    Config: ClassVar[type[MethodConfig]] = DINOConfig
    summary: ClassVar[str] = "a moving-average teacher's sharpened output told from any crop (Caron et al., 2021)"
    base_lr: ClassVar[float] = 5e-4  # Section 3.2: AdamW
    base_optimizer: ClassVar[str] = "adamw"
    loss_is_progress: ClassVar[bool] = False  # it starts near its entropy, and the teacher it follows changes

    centre: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: DINOConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder, self.head = encoder, Head(dim, config)
        self.teacher_encoder, self.teacher_head = follower(encoder), follower(self.head)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self._pending: list[Tensor] = []

    def exported(self) -> nn.Module:
        return self.teacher_encoder  # Section 3.1: better than the student throughout training

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        large = batch.views["global"][:2]  # [2, B, C, H, W]
        small = [batch.views["local"]] if "local" in batch.views else []  # [V - 2, B, C, h, w]
        student = _scores(self.encoder, self.head, [large, *small])  # [B, V, K]
        with torch.no_grad():
            return {"student": student, "teacher": _scores(self.teacher_encoder, self.teacher_head, [large])}

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        teacher = at_least_float32(embeddings["teacher"].detach())  # [B, 2, K]
        p = sharpened(teacher, self.centre, temperature=self.teacher_temperature(step))
        loss = self_distillation(embeddings["student"], p, temperature=self.config.student_temperature)  # Eq. 3

        means = torch.stack([teacher.mean((0, 1)), p.mean((0, 1))])  # [2, K]
        scores, shares = all_reduce_sum(means) / world_size()  # of the batch of all devices
        self._pending.append(scores)
        each = entropy(p).mean()
        terms = {"kl": loss - each, "entropy/image": each, "entropy/mean": entropy(shares)}
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def teacher_temperature(self, step: Step) -> float:
        """tau_t of a step: as many equal steps, one an epoch, as `temperature_epochs` has, then constant."""
        c = self.config
        if step.epoch >= c.temperature_epochs:
            return c.teacher_temperature
        return linear(step.epoch, c.temperature_epochs, c.warmup_teacher_temperature, c.teacher_temperature)

    def after_backward(self, step: Step) -> None:
        if step.epoch < self.config.freeze_last_layer_epochs:
            for parameter in self.head.prototypes.parameters():
                parameter.grad = None  # not zero, which momentum and weight decay would still move

    def after_step(self, step: Step) -> None:
        if self._pending:
            mean = torch.stack(self._pending).mean(0)
            # Under half precision a step may overflow and be skipped; its scores must not stay in the centre.
            mean = torch.where(mean.isfinite(), mean, self.centre)
            self.centre.lerp_(mean, 1 - self.config.centre_momentum)  # Eq. 4
            self._pending.clear()
        momentum = cosine(step.step, step.total_steps, self.config.momentum, self.config.final_momentum)
        follow(self.teacher_encoder, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)


class Head(nn.Module):
    """Three layers with GELU, L2 norm, and cosines to the prototypes (Section 3.1, Appendix C): [B, dim] -> [B, K]."""

    def __init__(self, dim: int, config: DINOConfig):
        super().__init__()
        widths = [dim, config.hidden, config.hidden, config.bottleneck]
        self.mlp = mlp(widths, bias=True, norm=config.head_batch_norm, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(config.bottleneck, config.prototypes, trainable_gain=not config.norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        return self.prototypes(unit(self.mlp(features)))


def _scores(encoder: nn.Module, head: nn.Module, streams: list[Tensor]) -> Tensor:
    """[V, B, C, H, W] of every stream -> [B, all views, K]: one pass of the encoder a size, one of the head."""
    images = streams[0].shape[1]
    if len({views.shape[2:] for views in streams}) == 1 and len(streams) > 1:
        streams = [torch.cat(streams)]
    # As in the released code: batch norm sees all views of one size together.
    features = torch.cat([encoder(views.flatten(0, 1)) for views in streams])  # [V B, D]
    return head(features).unflatten(0, (-1, images)).transpose(0, 1)
