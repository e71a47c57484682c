"""Passes over the whole un-augmented data set, for methods that relabel it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mvmr.config import Run
from mvmr.data.loading import plain_batches
from mvmr.data.sources import ImageSource, subset


def feature_pass(
    source: ImageSource, run: Run, *, rank: int, world_size: int
) -> Callable[[Callable[[Tensor], Tensor], torch.device], tuple[Tensor, Tensor]]:
    """A function (fn, device) -> (index [n], features [n, D]) over this rank's images: rank, rank + W, ..."""
    assert run.data.mean is not None
    assert run.data.std is not None
    mean, std = run.data.mean, run.data.std

    @torch.no_grad()
    def pass_over(fn: Callable[[Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        own = torch.arange(rank, len(source), world_size)
        mean_, std_ = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        part = source if world_size == 1 else subset(source, own)
        rows = []
        for _, images in plain_batches(part, batch_size=512, size=run.views.size, workers=run.data.workers):
            rows.append(fn((images.to(device).float() / 255 - mean_) / std_))
        return own, torch.cat(rows)

    return pass_over
