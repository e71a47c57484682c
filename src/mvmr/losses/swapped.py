"""Cluster codes predicted from other views: SwAV's swapped prediction (Caron et al., "Unsupervised learning of visual
features by contrasting cluster assignments", NeurIPS 2020, Eqs. 1, 2 and 6) and OSS's multi-view losses (Choi, Kang,
Oh, "Unsupervised representation transfer for small networks: I believe I can distill on-the-fly", NeurIPS 2021, Eqs. 2
to 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.losses.self_distillation import entropy
from mvmr.ops.collectives import all_reduce_sum, world_size
from mvmr.ops.precision import at_least_float32


def prediction_costs(scores: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    """SwAV Eq. 2, OSS Eq. 3: every view's cost of predicting every code: [B, V, K], [B, A, K] -> [V, A].

    Entry (v, a) is the mean over images of CE(q_a, p_v) = -sum_k q_a^(k) ln p_v^(k), with p_v = softmax(scores of view
    v / temperature); a plain mean, so the mean over ranks is that of the whole batch. Codes have no gradient and are
    not negative; as a row of them sums to 1, a uniform prediction costs ln K. float32 (or float64) whatever autocast
    says. Raises ValueError for shapes that do not fit and a temperature that is not positive.
    """
    if scores.dim() != 3 or codes.dim() != 3 or scores.shape[::2] != codes.shape[::2]:
        raise ValueError(f"[B, V, K] scores predict [B, A, K] codes, not {tuple(scores.shape)} {tuple(codes.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    with torch.autocast(scores.device.type, enabled=False):
        s, q = at_least_float32(scores) / temperature, at_least_float32(codes.detach())
        # -<q, log softmax(s)> without the [B, V, K] logarithms.
        log_sums = s.logsumexp(2)[:, :, None] * q.sum(2)[:, None]  # [B, V, A]
        return (log_sums - s @ q.mT.to(s.dtype)).mean(0)


def swapped_prediction(scores: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    """SwAV Eq. 6, the mean over pairs of a code and another view of its image: [B, V, K], [B, A, K] -> scalar.

    codes: those of the first A <= V views; there are A (V - 1) pairs, which the paper adds up and its released code
    averages. With two views it is half of Eq. 1. As `prediction_costs`; ValueError also where no pair is left.
    """
    costs = prediction_costs(scores, codes, temperature=temperature)  # [V, A]
    views, known = costs.shape
    if not 1 <= known <= views or views < 2:
        raise ValueError(f"codes of {known} views among {views} leave nothing to swap")
    return (costs.sum() - costs.diagonal().sum()) / (known * (views - 1))


def swapped_sum(scores: Tensor, codes: Tensor, *, temperature: float) -> tuple[Tensor, int]:
    """OSS Eqs. 2 and 4, an image's sum over its two full crops, each with the other's code: [B, 2, K] twice.

    Returns the sum, averaged over images, and its number of terms, 2.
    """
    costs = prediction_costs(scores, codes, temperature=temperature)  # [2, 2]
    return costs.sum() - costs.diagonal().sum(), 2


def multi_view_sum(scores: Tensor, codes: Tensor, *, temperature: float) -> tuple[Tensor, int]:
    """OSS Eq. 5, for small crops or for dropout's views: every view predicts both codes, [B, V, K], [B, 2, K].

    A dropout view of a full crop predicts its own crop's code, too. Returns the sum over pairs, averaged over images,
    and its number of terms, 2 V.
    """
    costs = prediction_costs(scores, codes, temperature=temperature)  # [V, 2]
    return costs.sum(), costs.numel()


@torch.no_grad()
def code_terms(scores: Tensor, codes: Tensor, temperature: float) -> dict[str, Tensor]:
    """What tells whether codes mean anything, for logs: scores [B, V, K], codes [B, 2, K] of the first two views.

    agreement: share of views whose nearest prototype is the first in the other view's code; entropy/code: mean entropy
    of a code; entropy/mean: entropy of the mean prediction over the batch of all ranks. Both are at most ln K.
    """
    swapped = scores[:, :2].argmax(2) == codes.argmax(2).flip(1)  # [B, 2]
    mean = torch.softmax(scores[:, :2] / temperature, dim=2).mean((0, 1))  # [K]
    return {
        "agreement": swapped.to(scores.dtype).mean(),
        "entropy/code": entropy(codes).mean(),
        "entropy/mean": entropy(all_reduce_sum(mean) / world_size()),
    }
