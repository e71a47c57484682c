"""Losses by which a student learns a frozen teacher's embedding space, without labels.

SEED: Fang, Wang, Wang, Zhang, Yang, Liu, "SEED: self-supervised distillation for visual representation", ICLR 2021.
CompRess: Koohpayegani, Tejankar, Pirsiavash, "CompRess: self-supervised learning by compressing representations",
NeurIPS 2020, which also has the regression with batch norm. All are computed in float32 (or float64) whatever autocast
says, and no gradient reaches the teacher's side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.ops.precision import at_least_float32

__all__ = ["anchor_logits", "distribution_divergence", "regression", "soft_cross_entropy"]


def anchor_logits(x: Tensor, anchors: Tensor, *, temperature: float) -> Tensor:
    """CompRess, Section 3: x . a_j / tau for every anchor a_j, [B, D] and [K, D] -> [B, K].

    Rows are taken as they are: of unit length, they make the products cosines. No gradient reaches the anchors.
    Raises ValueError for widths that differ and a temperature that is not positive.
    """
    if x.dim() != 2 or anchors.dim() != 2 or x.shape[1] != anchors.shape[1]:
        raise ValueError(f"embeddings [B, D] are compared with anchors [K, D], not {[*x.shape]}, {[*anchors.shape]}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    with torch.autocast(x.device.type, enabled=False):
        return at_least_float32(x) @ at_least_float32(anchors.detach()).T / temperature


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """SEED's loss (Section 3.2): -sum_j p_j log q_j, the mean over images; logits [B, K] twice -> scalar.

    p and q are the softmax of the teacher's and of the student's logits, each already divided by its temperature.
    Raises ValueError for shapes that differ.
    """
    _check_pair(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        p = torch.softmax(at_least_float32(teacher.detach()), dim=1)  # [B, K]
        return -(p * torch.log_softmax(at_least_float32(student), dim=1)).sum(1).mean()


def distribution_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """CompRess's loss (Section 3), KL(p || q) = sum_j p_j (log p_j - log q_j): arguments as `soft_cross_entropy`'s.

    The same gradient as the cross-entropy's, and 0 where the two distributions are equal.
    """
    _check_pair(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        log_p = torch.log_softmax(at_least_float32(teacher.detach()), dim=1)
        log_q = torch.log_softmax(at_least_float32(student), dim=1)
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def regression(student: Tensor, teacher: Tensor, *, batch_norm: bool = False, epsilon: float = 1e-5) -> Tensor:
    """Reg, the squared distance, averaged over images and dimensions: [B, D] twice -> scalar.

    batch_norm: Reg-BN, where each column of either side first gets mean 0 and (biased) variance 1 over the batch, by
    batch norm without parameters; the loss is then 2 (1 - the columns' mean correlation), up to epsilon.
    Raises ValueError for shapes that differ, and for fewer than two images with batch norm.
    """
    _check_pair(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        s, t = at_least_float32(student), at_least_float32(teacher.detach())
        if batch_norm:
            s, t = _standardised(s, epsilon), _standardised(t, epsilon)
        return (s - t).square().mean()


def _standardised(x: Tensor, epsilon: float) -> Tensor:
    if len(x) < 2:
        raise ValueError("batch norm needs two images or more")
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    return (x - mean) * (variance + epsilon).rsqrt()


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"two [B, D] of one shape are compared, not {[*student.shape]}, {[*teacher.shape]}")
