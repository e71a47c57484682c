"""CompRess: Koohpayegani, Tejankar, Pirsiavash, "CompRess: self-supervised learning by compressing representations",
NeurIPS 2020. Sections are numbered as there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mvmr.losses.self_distillation import entropy
from mvmr.losses.similarity_distillation import anchor_logits, distribution_divergence
from mvmr.methods.base import DistillationConfig, Method
from mvmr.ops.collectives import gather
from mvmr.ops.ema import follow, follower
from mvmr.ops.queue import Queue
from mvmr.ops.unit import unit
from mvmr.types import Batch, Step


class CompRessConfig(DistillationConfig):
    """Settings of CompRess; the defaults are the paper's, with two queues."""

    name: Literal["compress"] = "compress"
    """The method's key."""
    queues: Literal[1, 2] = 2
    """2: teacher and student each have a queue of their own (2q); 1: both are compared with the teacher's (1q)."""
    queue: int = Field(128000, ge=1)
    """Anchors in each queue, embeddings of past images (Section 4)."""
    temperature: float = Field(0.04, gt=0)
    """tau of both softmaxes (Section 4)."""
    momentum: float | None = Field(0.999, ge=0, le=1)
    """What the network that fills the student's queue keeps of itself at a step; null: the student fills it (2q)."""

    def remarks(self, counts: Mapping[str, int], representations: Collection[str]) -> list[str]:
        idle = self.queues == 1 and self.momentum != type(self).model_fields["momentum"].default
        said = ["no effect with method.queues=1: method.momentum"] if idle else []
        return super().remarks(counts, representations) + said


class CompRess(Method):
    """The student's similarities to past images become the teacher's, each measured in its own space (2q) or in one."""

    Config: ClassVar[type[DistillationConfig]] = CompRessConfig
    summary: ClassVar[str] = "a frozen teacher's neighbourhoods kept in a smaller network (Koohpayegani et al., 2020)"
    base_lr: ClassVar[float] = 0.01  # Section 4: SGD, batch 256
    base_optimizer: ClassVar[str] = "sgd"
    loss_is_progress: ClassVar[bool] = False  # the student's anchors move with it, and both start at random

    def __init__(self, encoder: nn.Module, dim: int, config: CompRessConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        two = config.queues == 2
        # Of two queues each has the width of its own network, so nothing has to be projected.
        self.head = nn.Identity() if two else nn.Linear(dim, config.width)
        self.key_encoder = follower(encoder) if two and config.momentum is not None else None
        self.teacher_queue = Queue(config.queue, config.width)
        self.student_queue = Queue(config.queue, dim) if two else None
        self._pending: list[tuple[Tensor, Tensor]] = []  # (teacher's, student's) of batches whose step is to come

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        view = batch.views["global"][0]  # [B, C, H, W]
        student = unit(self.head(self.encoder(view)))  # [B, D], or [B, F] with one queue
        if self.key_encoder is None:
            return {"student": student, "key": student.detach()}
        with torch.no_grad():
            return {"student": student, "key": unit(self.key_encoder(view))}

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        c = self.config
        s, t = embeddings["student"], unit(batch.representations[c.teacher])  # [B, D], [B, F]
        anchors = self.teacher_queue if self.student_queue is None else self.student_queue
        teacher = anchor_logits(t, self.teacher_queue.keys, temperature=c.temperature)  # [B, K]
        student = anchor_logits(s, anchors.keys, temperature=c.temperature)  # [B, K]
        loss = distribution_divergence(student, teacher)  # Section 3; a mean over images
        self._pending.append((gather(t), gather(embeddings["key"].detach())))
        agreement = (student.detach().argmax(1) == teacher.argmax(1)).to(t.dtype).mean()
        terms = {"entropy/teacher": entropy(teacher.softmax(1)).mean(), "accuracy": agreement}
        terms |= {"entropy/student": entropy(student.detach().softmax(1)).mean()}
        terms |= {"z_std": s.detach().std(0, correction=0).mean()}
        return {"loss": loss, **terms}

    def after_step(self, step: Step) -> None:
        for teacher, student in self._pending:  # both at once, so that equal slots stay of one image
            self.teacher_queue.push(teacher)
            if self.student_queue is not None:
                self.student_queue.push(student)
        self._pending.clear()
        if self.key_encoder is not None and self.config.momentum is not None:
            follow(self.key_encoder, self.encoder, self.config.momentum)
