"""InfoNCE with the negatives of a queue: MoCo's loss.

He, Fan, Wu, Xie, Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR 2020, Eq. 1;
the loss itself is of van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.ops.precision import at_least_float32

__all__ = ["info_nce", "queue_logits", "top1"]


def queue_logits(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """MoCo Eq. 1, the exponents q.k / tau: [B, D], [B, D], [K, D] -> [B, 1 + K], each query's own key first.

    Rows are taken as they are: of unit length, they make the products cosines. No gradient reaches key or queue. In
    float32 (or float64) whatever autocast says. Raises ValueError for shapes that do not fit and temperature <= 0.
    """
    if query.dim() != 2 or query.shape != key.shape or queue.dim() != 2 or queue.shape[1] != query.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, queue))
        raise ValueError(f"queue_logits takes queries [B, D], keys [B, D] and a queue [K, D], not {shapes}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    with torch.autocast(query.device.type, enabled=False):
        q, k, others = at_least_float32(query), at_least_float32(key.detach()), at_least_float32(queue.detach())
        own = (q * k).sum(1, keepdim=True)  # [B, 1]
        return torch.cat([own, q @ others.T], 1) / temperature


def info_nce(logits: Tensor) -> Tensor:
    """MoCo Eq. 1: -log of the softmax's share of column 0, averaged over queries: [B, 1 + K] -> scalar."""
    with torch.autocast(logits.device.type, enabled=False):
        own = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return functional.cross_entropy(at_least_float32(logits), own)


def top1(logits: Tensor) -> Tensor:
    """Share of queries that are nearer to their own key than to every other: [B, 1 + K] -> scalar in [0, 1]."""
    return (logits[:, 0] > logits[:, 1:].amax(1)).to(logits.dtype).mean()
