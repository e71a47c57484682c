"""OSS's feature classifier: which network is an embedding of? (Choi, Kang, Oh, NeurIPS 2021, Section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.precision import at_least_float32


def domain_sum(teacher: Tensor, student: Tensor) -> tuple[Tensor, int]:
    """OSS Eq. 7, an image's sum over its crops i of -ln d_T,i^(0) - ln d_S,i^(1): [B, I, 2] scores twice -> scalar.

    d = softmax of a network's two scores; the teacher's label is 0, the student's 1. Returns the sum, averaged over
    images, and its number of terms, 2 I. float32 (or float64) whatever autocast says. Raises ValueError for shapes that
    differ.
    """
    if teacher.shape != student.shape or teacher.dim() != 3 or teacher.shape[2] != 2:
        raise ValueError(f"two [B, I, 2] scores are compared, not {tuple(teacher.shape)} and {tuple(student.shape)}")
    with torch.autocast(teacher.device.type, enabled=False):
        of_teacher = torch.log_softmax(at_least_float32(teacher), dim=2)[..., 0]  # [B, I]
        of_student = torch.log_softmax(at_least_float32(student), dim=2)[..., 1]
        return -(of_teacher + of_student).sum(1).mean(), 2 * teacher.shape[1]


@torch.no_grad()
def domain_accuracy(teacher: Tensor, student: Tensor) -> Tensor:
    """Share of embeddings whose network is told rightly, [B, I, 2] scores twice -> scalar; 0.5 is chance."""
    right = torch.cat([teacher[..., 0] > teacher[..., 1], student[..., 1] > student[..., 0]])
    return right.float().mean()
