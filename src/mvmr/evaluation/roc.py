"""Area under the receiver operating characteristic: how surely a class's images are scored above the others."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.types import RunError, UserError


def roc_auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area in [0, 1] of every class by itself: scores [N] or [N, C] -> [] or [C], float64.

    labels: of the scores' shape; 1 present, 0 absent, -1 left out. The share of pairs of a present and an absent image
    in which the present one has the higher score, equal scores counting half (Hanley and McNeil, Radiology 1982);
    counted in whole numbers. NaN for a class without both.
    Raises UserError for other shapes, RunError for scores that are NaN.
    """
    if scores.shape != labels.shape or scores.ndim not in (1, 2):
        raise UserError(f"scores {list(scores.shape)} and labels {list(labels.shape)} must both be [N] or [N, C]")
    if bool(scores.isnan().any()):
        raise RunError("scores are NaN, so there is no ranking: features or a classifier have diverged")
    columns = zip(scores.reshape(len(scores), -1).T, labels.reshape(len(labels), -1).T, strict=True)
    found = torch.stack([_of_class(*column) for column in columns])
    return found if scores.ndim == 2 else found[0]


def _of_class(scores: Tensor, labels: Tensor) -> Tensor:
    present, absent = scores[labels == 1].contiguous(), scores[labels == 0].sort().values
    below = torch.searchsorted(absent, present)  # absent ones of a lower score
    not_above = torch.searchsorted(absent, present, right=True)
    twice = (below + not_above).sum().double()
    return twice / (2 * len(present) * len(absent)) if len(present) and len(absent) else twice.new_tensor(torch.nan)
