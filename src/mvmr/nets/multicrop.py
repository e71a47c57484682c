"""Views of several sizes through one encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def encode_views(encoder: nn.Module, streams: Sequence[Tensor]) -> Tensor:
    """[V, B, C, H, W] of every stream -> features of all views in order [sum of V, B, D]; one pass a size of image.

    As in SwAV's and DINO's released codes: batch norm sees all views of one size together.
    """
    features: list[Tensor] = []
    waiting: list[Tensor] = []
    for i, views in enumerate(streams):
        waiting.append(views.flatten(0, 1))  # [V B, C, H, W]
        if i + 1 == len(streams) or streams[i + 1].shape[2:] != views.shape[2:]:
            features.append(encoder(torch.cat(waiting) if len(waiting) > 1 else waiting[0]))
            waiting = []
    return torch.cat(features).unflatten(0, (-1, streams[0].shape[1]))
