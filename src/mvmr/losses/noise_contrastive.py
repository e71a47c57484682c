"""Noise contrastive estimation over a memory bank: the loss of contrastive representation distillation.

Tian, Krishnan, Isola, "Contrastive representation distillation", ICLR 2020, Section 3.1; the estimate of the partition
function is that of Wu, Xiong, Yu, Lin, "Unsupervised feature learning via non-parametric instance discrimination", CVPR
2018, Section 3.2, which the released code follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.precision import at_least_float32

__all__ = ["bank_logits", "noise_contrastive", "partition_estimate"]


def bank_logits(anchors: Tensor, bank: Tensor, index: Tensor, *, temperature: float) -> Tensor:
    """v_b . m_i / tau for the rows i = index[b, k] of a bank: [B, D], [N, D], [B, K] int64 -> [B, K].

    Rows are taken as they are. No gradient reaches the bank. float32 (or float64) whatever autocast says. Memory is
    that of [B, N] products or of [B, K, D] copied rows, whichever is less. Raises ValueError for shapes that do not fit
    and a temperature that is not positive.
    """
    fits = anchors.dim() == bank.dim() == index.dim() == 2 and anchors.shape == (len(index), bank.shape[1])
    if not fits:
        shapes = ", ".join(str([*x.shape]) for x in (anchors, bank, index))
        raise ValueError(f"bank_logits takes anchors [B, D], a bank [N, D] and an index [B, K], not {shapes}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    with torch.autocast(anchors.device.type, enabled=False):
        v, rows = at_least_float32(anchors), at_least_float32(bank.detach())
        if len(bank) <= index.shape[1] * bank.shape[1]:
            return (v @ rows.T).gather(1, index) / temperature
        return torch.einsum("bd,bkd->bk", v, rows[index]) / temperature


@torch.no_grad()
def partition_estimate(logits: Tensor, *, images: int) -> Tensor:
    """An estimate of Z = sum over all N rows of exp(v . m / tau): N times the mean over logits [B, K] -> scalar."""
    return at_least_float32(logits).exp().mean() * images


def noise_contrastive(logits: Tensor, *, images: int, partition: Tensor) -> Tensor:
    """CRD's loss (Section 3.1) of one side, averaged over anchors: [B, 1 + K], each anchor's own row first -> scalar.

    - log P(own) - sum over the K others of log(1 - P), with P = p / (p + K / N) and p = exp(logit) / Z: the chance that
    a pair is the image's own, and not one of K that were drawn uniformly from the N images. 1e-7 is added to the
    denominators as in the released code. partition: Z, a scalar without gradient. float32 (or float64) whatever
    autocast says. Raises ValueError for logits without a negative.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"noise_contrastive takes logits [B, 1 + K] with K of at least 1, not {[*logits.shape]}")
    with torch.autocast(logits.device.type, enabled=False):
        log_p = at_least_float32(logits) - partition.detach().log()  # [B, 1 + K]
        noise = torch.as_tensor((logits.shape[1] - 1) / images, dtype=log_p.dtype, device=log_p.device)
        log_total = (log_p.exp() + (noise + 1e-7)).log()  # [B, 1 + K]
        own = log_p[:, 0] - log_total[:, 0]
        others = noise.log() - log_total[:, 1:]
        return -(own + others.sum(1)).mean()
