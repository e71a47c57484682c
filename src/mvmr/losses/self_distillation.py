"""Self-distillation by cross-entropy: DINO (Caron et al., "Emerging properties in self-supervised vision transformers",
ICCV 2021), Eqs. 1 to 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.precision import at_least_float32


def sharpened(scores: Tensor, centre: Tensor, *, temperature: float) -> Tensor:
    """DINO's P_t = softmax((g_t - c) / tau_t) over the last dimension, without gradient: [..., K], [K] -> [..., K].

    The centre is subtracted, as in the pseudo-code (Algorithm 1); the formula in Section 3.1 prints a plus, which
    pushes every output further towards the mean and so collapses. float32 (or float64) whatever autocast says.
    """
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        return torch.softmax((at_least_float32(scores) - centre) / temperature, dim=-1)


def self_distillation(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """DINO Eq. 3, the mean over pairs of different views of CE(P_t, P_s), averaged over images (Eqs. 1, 2) -> scalar.

    student: [B, V, K] scores of V views; P_s = softmax(student / temperature). teacher: [B, T, K] probabilities of the
    first T of these views. There are T V - T pairs. Since P_t sums to 1, CE(P_t, P_s) is logsumexp(s) - <P_t, s> with
    s = student / temperature, so that no log-softmax of V B K values is kept. float32 (or float64) whatever autocast
    says. Raises ValueError for shapes that do not fit, and where no pair is left.
    """
    views, known = student.shape[1] if student.dim() == 3 else 0, teacher.shape[1] if teacher.dim() == 3 else 0
    fits = student.shape[:1] == teacher.shape[:1] and student.shape[2:] == teacher.shape[2:]
    if not (fits and 1 <= known <= views and views > 1):
        raise ValueError(
            "self_distillation compares [B, V, K] with [B, T, K] for 1 <= T <= V and V > 1, "
            f"not {tuple(student.shape)} with {tuple(teacher.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        targets = at_least_float32(teacher.detach())
        of_all = targets.sum(1)  # [B, K], what every view without a teacher of its own is compared with
        total = of_all.new_zeros(())
        for view, scores in enumerate(student.unbind(1)):
            s = at_least_float32(scores) / temperature  # [B, K]
            own = view < known
            others = torch.cat([targets[:, :view], targets[:, view + 1 :]], dim=1).sum(1) if own else of_all  # [B, K]
            pairs = known - 1 if own else known
            total = total + (pairs * s.logsumexp(1) - (others * s).sum(1)).mean()
        return total / (known * views - known)


def entropy(p: Tensor) -> Tensor:
    """-sum_k p_k ln p_k over the last dimension, with 0 ln 0 = 0: [..., K] -> [...], in [0, ln K]."""
    return -torch.special.xlogy(p, p).sum(-1)
