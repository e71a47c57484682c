"""Average precision of a ranking as PASCAL VOC defines it: of 2007 at eleven recalls, and of 2010 over all of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mvmr.types import RunError, UserError

Definition = Literal["voc07", "all"]


def average_precision(scores: Tensor, labels: Tensor, *, definition: Definition = "voc07") -> Tensor:
    """Average precision in [0, 1] of every class by itself: scores [N] or [N, C] -> [] or [C], float64.

    labels: of the scores' shape; 1 present, 0 absent, -1 left out. With p(r) the largest precision at any recall of r
    or more, "voc07" is the mean of p over r = 0, 0.1, ..., 1 (Everingham et al., IJCV 2010, Section 4.2), and "all"
    is the area under p (the VOC2010 development kit, Section 3.4.1). Recalls are compared as whole numbers, so rounding
    decides nothing. As in the official kits, equal scores are ranked in the order in which they are given.
    NaN for a class without a present label. Neither value is scikit-learn's, which does not interpolate.
    Raises UserError for other shapes or labels, RunError for scores that are NaN.
    """
    if scores.shape != labels.shape or scores.ndim not in (1, 2):
        raise UserError(f"scores {list(scores.shape)} and labels {list(labels.shape)} must both be [N] or [N, C]")
    if not bool(((labels >= -1) & (labels <= 1)).all()):
        raise UserError("labels must be 1 (present), 0 (absent) or -1 (left out)")
    if bool(scores.isnan().any()):
        raise RunError("scores are NaN, so there is no ranking: features or a classifier have diverged")
    if len(scores) == 0:
        return torch.full(scores.shape[1:], torch.nan, dtype=torch.float64, device=scores.device)
    # A row left out counts neither as a hit nor as seen: it repeats the precision above it and changes no maximum.
    ranked = labels.gather(0, scores.argsort(dim=0, descending=True, stable=True))
    hits, seen = (ranked == 1).cumsum(0), (ranked >= 0).cumsum(0)  # [N] or [N, C] int64
    positives = hits[-1:]  # [1] or [1, C]
    best = (hits / seen.clamp_min(1).double()).flip(0).cummax(0).values.flip(0)  # p at each rank's recall
    if definition == "all":
        value = torch.where(ranked == 1, best, 0.0).sum(0) / positives[0]
    else:
        reached = [(10 * hits < tenth * positives).sum(0, keepdim=True).clamp_max(len(hits) - 1) for tenth in range(11)]
        value = best.gather(0, torch.cat(reached)).mean(0)
    return torch.where(positives[0] > 0, value, torch.nan)
