"""CRD: Tian, Krishnan, Isola, "Contrastive representation distillation", ICLR 2020, without the term that needs labels.
Sections are numbered as there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mvmr.losses.noise_contrastive import bank_logits, noise_contrastive, partition_estimate
from mvmr.methods.base import DistillationConfig, Method
from mvmr.ops.collectives import all_reduce_sum, gather, world_size
from mvmr.ops.random import uniform
from mvmr.ops.unit import unit
from mvmr.types import Batch, Step

NEGATIVES_STREAM = 0xFFFFFFFC
"""The stream of the negatives' numbers; the streams of views are small numbers, the three above are taken."""


class CRDConfig(DistillationConfig):
    """Settings of CRD; the defaults are the released code's."""

    name: Literal["crd"] = "crd"
    """The method's key."""
    dim: int = Field(128, ge=1)
    """Width that both embeddings are mapped to, by a linear layer each (Section 3.1)."""
    negatives: int = Field(16384, ge=1)
    """K, rows of the memory drawn for every image, uniformly and with replacement (Section 3.1: N there)."""
    temperature: float = Field(0.07, gt=0)
    """tau (Section 3.1)."""
    momentum: float = Field(0.5, ge=0, le=1)
    """What a row of the memories keeps of itself when its image is met."""


class CRD(Method):
    """Each network's embedding of an image is told, among many images', by the other's."""

    Config: ClassVar[type[DistillationConfig]] = CRDConfig
    summary: ClassVar[str] = "a frozen teacher's embedding told from a memory of all images' (Tian et al., 2020)"
    base_lr: ClassVar[float] = 0.2  # released code: SGD, 0.05 for a batch of 64
    base_optimizer: ClassVar[str] = "sgd"

    student_memory: Tensor
    teacher_memory: Tensor
    partitions: Tensor

    def __init__(self, encoder: nn.Module, dim: int, config: CRDConfig):
        super().__init__(encoder, dim, config)
        self.config = config
        self.encoder = encoder
        self.student_head, self.teacher_head = nn.Linear(dim, config.dim), nn.Linear(config.width, config.dim)
        self.register_buffer("partitions", torch.zeros(2))  # Z of the student's and the teacher's anchors; 0: not known
        self._seed = int(torch.randint(2**31, ()))  # of the run's seed, so equal on all ranks and after a restart
        self._pending: list[tuple[Tensor, ...]] = []

    def prepare(self, images: int) -> None:
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, functional.normalize(torch.randn(images, self.config.dim), dim=1))  # [N, D]

    def exported(self) -> nn.Module:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        student = self.student_head(self.encoder(batch.views["global"][0]))
        teacher = self.teacher_head(batch.representations[self.config.teacher])
        return {"student": unit(student), "teacher": unit(teacher)}  # [B, D] each

    def objective(self, embeddings: dict[str, Tensor], batch: Batch, step: Step) -> dict[str, Tensor]:
        s, t, tau = embeddings["student"], embeddings["teacher"], self.config.temperature
        index, images = batch.index.to(s.device), len(self.teacher_memory)
        rows = torch.cat([index[:, None], self.negatives(index, step)], 1)  # [B, 1 + K], the own row first
        student = bank_logits(s, self.teacher_memory, rows, temperature=tau)
        teacher = bank_logits(t, self.student_memory, rows, temperature=tau)
        z = self._partitions([partition_estimate(logits, images=images) for logits in (student, teacher)])
        of_student = noise_contrastive(student, images=images, partition=z[0])
        of_teacher = noise_contrastive(teacher, images=images, partition=z[1])
        self._pending.append((gather(index), gather(s.detach()), gather(t.detach()), z))
        nearest = student[:, 0] >= student[:, 1:].amax(1)  # the own row may have been drawn, too
        terms = {"student": of_student, "teacher": of_teacher, "accuracy": nearest.to(s.dtype).mean()}
        terms |= {"similarity": (s * t).sum(1).mean(), "z_std": s.std(0, correction=0).mean()}
        return {"loss": of_student + of_teacher, **{name: value.detach() for name, value in terms.items()}}

    def negatives(self, index: Tensor, step: Step) -> Tensor:
        """Positions drawn for the images [B] at a step, [B, K]: a pure function of the run's seed, image and step."""
        drawn = uniform(self._seed, step.step, index, NEGATIVES_STREAM, self.config.negatives)
        return (drawn * len(self.teacher_memory)).long()

    def _partitions(self, estimates: list[Tensor]) -> Tensor:
        """Z of both sides, [2]: those of the first batch of all devices, kept from then on."""
        now = all_reduce_sum(torch.stack(estimates)) / world_size()
        return torch.where(self.partitions > 0, self.partitions, now.to(self.partitions.dtype))

    def after_step(self, step: Step) -> None:
        for index, student, teacher, z in self._pending:
            for memory, met in ((self.student_memory, student), (self.teacher_memory, teacher)):
                row = torch.lerp(met.to(memory.dtype), memory[index], self.config.momentum)
                memory.index_copy_(0, index, functional.normalize(row, dim=1))
            self.partitions.copy_(torch.where(self.partitions > 0, self.partitions, z))
        self._pending.clear()
