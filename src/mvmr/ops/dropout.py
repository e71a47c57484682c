"""Dropout as a function of image and key, so that its masks do not depend on which rank has an image, or beside whom.

Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.collectives import from_first_rank
from mvmr.ops.random import philox


def dropout_key(device: torch.device) -> Tensor:
    """Two random words, int64 [2], the same on all ranks: one broadcast.

    Drawn by torch's default generator, which the engine seeds with the step's number; rank 0's are taken.
    """
    return from_first_rank(torch.randint(1 << 32, (2,)).to(device))


def kept_units(key: Tensor, index: Tensor, stream: int, *, width: int, rate: float) -> Tensor:
    """Which of `width` units of every image stay: index [B] int64 -> [B, width] bool, False with probability `rate`.

    A pure function of its arguments, by Philox: key int64 [2]; stream below 2^32 tells views and layers apart. On the
    key's device. Raises ValueError for a rate outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate is in [0, 1), not {rate}")
    position = index.to(key.device)
    counter = torch.empty((len(position), -(-width // 4), 4), dtype=torch.int64, device=key.device)
    counter[..., 0] = position[:, None]
    counter[..., 1] = (position >> 32)[:, None]
    counter[..., 2] = stream
    counter[..., 3] = torch.arange(counter.shape[1], device=key.device)
    words = philox(counter, key).flatten(1)[:, :width]  # [B, width]
    return words >= round(rate * (1 << 32))


def dropped(x: Tensor, kept: Tensor, rate: float) -> Tensor:
    """The units that are kept, each divided by 1 - rate, and 0 for the others: [n, D], [n, D] bool -> [n, D]."""
    return torch.where(kept, x / (1.0 - rate), torch.zeros((), dtype=x.dtype, device=x.device))
