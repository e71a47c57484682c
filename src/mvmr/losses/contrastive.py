"""Contrastive losses within one batch: SimCLR's NT-Xent and MoCo v3's InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mvmr.ops.unit import unit


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """SimCLR Eq. 1 and Algorithm 1, over two views of B images: [B, D], [B, D] -> (loss, accuracy), scalars.

    l(i, j) = -log exp(s_ij / t) / sum_{k != i} exp(s_ik / t), s the cosine and j the other view of i's image, averaged
    over the 2B views i; the positive stays in the sum (Chen, Kornblith, Norouzi, Hinton, ICML 2020). Each loss of the
    official code is a mean over B, and the two are added: twice this. The accuracy, without gradient, is the share of
    views whose nearest other view is their partner. Rows need not be normalised. Computed in float32 (or float64)
    whatever autocast says. Raises ValueError for shapes that differ and a temperature that is not positive.
    """
    _check(z1, z2, temperature)
    if z1.shape[0] != z2.shape[0]:
        raise ValueError(f"nt_xent pairs rows, but there are {z1.shape[0]} and {z2.shape[0]}")
    with torch.autocast(z1.device.type, enabled=False):
        z = unit(torch.cat([z1, z2]))  # [2 B, D]
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)  # [2 B, 2 B]
        partner = torch.arange(len(z), device=z.device).roll(len(z1))  # [2 B]
        return F.cross_entropy(logits, partner), _accuracy(logits, partner)


def in_batch_info_nce(queries: Tensor, keys: Tensor, *, temperature: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """MoCo v3 Eq. 1 and Algorithm 1's `ctr`: [B, D], [N, D] with N >= B -> (loss, accuracy), scalars.

    2 t times the mean over queries i of -log exp(s_ij / t) / sum_k exp(s_ik / t), s the cosine and j = offset + i the
    key of the query's image: with the keys of all ranks, offset is rank x B. The factor 2 t makes gradients of one
    size at every temperature (Chen, Xie, He, ICCV 2021). Linear in the queries: the mean over ranks is the loss of the
    whole batch. The accuracy, without gradient, is the share of queries whose nearest key is their own. Rows need not
    be normalised. Computed in float32 (or float64) whatever autocast says.
    Raises ValueError for widths that differ, an offset that leaves a query without key, and a temperature that is not
    positive.
    """
    _check(queries, keys, temperature)
    if not 0 <= offset <= len(keys) - len(queries):
        raise ValueError(f"{len(queries)} queries from offset {offset} on need more than {len(keys)} keys")
    with torch.autocast(queries.device.type, enabled=False):
        q, k = (unit(x) for x in (queries, keys))
        logits = q @ k.T / temperature  # [B, N]
        own = torch.arange(offset, offset + len(q), device=q.device)  # [B]
        return 2 * temperature * F.cross_entropy(logits, own), _accuracy(logits, own)


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == target).to(logits.dtype).mean()


def _check(a: Tensor, b: Tensor, temperature: float) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a contrastive loss compares rows of one width, not {tuple(a.shape)} and {tuple(b.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
