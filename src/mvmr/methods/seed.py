"""SEED: Fang, Wang, Wang, Zhang, Yang, Liu, "SEED: self-supervised distillation for visual representation", ICLR 2021.
Sections are numbered as there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.info_nce import queue_logits, top1
from mvmr.losses.self_distillation import entropy
from mvmr.losses.similarity_distillation import soft_cross_entropy
from mvmr.methods.base import DistillationConfig, Method
from mvmr.ops.collectives import gather
from mvmr.ops.layers import mlp
from mvmr.ops.queue import Queue
from mvmr.ops.unit import unit
from mvmr.types import Batch, Step


class SEEDConfig(DistillationConfig):
    """Settings of SEED; the defaults are the paper's."""

    name: Literal["seed"] = "seed"
    """The method's key."""
    hidden: int | None = Field(None, ge=1)
    """Width inside the student's head, Linear, ReLU, Linear (released code); null: the encoder's width."""
    queue: int = Field(65536, ge=1)
    """K, the teacher's embeddings of past images that the similarities are taken to (Section 4.1)."""
    student_temperature: float = Field(0.2, gt=0)
    """tau^S of the student's softmax (Section 3.2)."""
    teacher_temperature: float = Field(0.01, gt=0)
    """tau^T of the teacher's softmax; the released code's default is 1e-4, which leaves one image: the own one."""


class SEED(Method):
    """The student's similarities to a queue of the teacher's embeddings become those of the teacher."""

    Config: ClassVar[type[DistillationConfig]] = SEEDConfig
    summary: ClassVar[str] = "a frozen teacher's similarities to a queue of images, distilled (Fang et al., 2021)"
    base_lr: ClassVar[float] = 0.03  # Section 4.1: SGD
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # it rises while the queue's random start gives way to embeddings

    def __init__(self, encoder: nn.Module, dim: int, config: SEEDConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.head = mlp([dim, config.hidden or dim, config.width], bias=True, norm=False)
        self.queue = Queue(config.queue, config.width)
        self._pending: list[Tensor] = []

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {"student": self.head(self.encoder(batch.views["global"][0]))}  # [B, F]

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        c = self.config
        s, t = unit(embeddings["student"]), unit(batch.representations[c.teacher])  # [B, F]
        # The teacher's own embedding of the image comes before the queue's: the student is to be near it too.
        student = queue_logits(s, t, self.queue.keys, temperature=c.student_temperature)  # [B, 1 + K]
        teacher = queue_logits(t, t, self.queue.keys, temperature=c.teacher_temperature)
        loss = soft_cross_entropy(student, teacher)  # Section 3.2; a mean over images, so this rank's part will do
        self._pending.append(gather(t))
        spread = entropy(teacher.softmax(1)).mean()
        terms = {"kl": loss - spread, "entropy": spread, "accuracy": top1(student), "similarity": (s * t).sum(1).mean()}
        terms["z_std"] = s.std(0, correction=0).mean()
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def after_step(self, step: Step) -> None:
        for embeddings in self._pending:
            self.queue.push(embeddings)
        self._pending.clear()
