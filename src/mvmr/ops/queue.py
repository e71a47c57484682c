"""The last K keys, first in first out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Queue(nn.Module):
    """A ring of the last `size` keys (MoCo, Section 3.2), float32 [K, D]; it starts with random unit vectors.

    The start is of torch's default generator, so equal on all ranks where their seed is. State is in two buffers, the
    keys and the slot of the oldest one, and stays on its device: a push does not wait for it.
    Raises ValueError for a size or a dimension below 1.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs a size and a dimension of at least 1, not {size} and {dim}")
        self.register_buffer("keys", functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Put keys [n, D] in place of the n oldest; n is any number, and of more than K the last K stay.

        Ranks must push the same keys: gather them first. Raises ValueError for rows of another length.
        """
        if keys.dim() != 2 or keys.shape[1] != self.keys.shape[1]:
            raise ValueError(f"this queue takes keys [n, {self.keys.shape[1]}], not {list(keys.shape)}")
        size, pushed = len(self.keys), len(keys)
        kept = keys[-size:].nan_to_num(0.0, 0.0, 0.0)  # of a step that overflowed: a zero key repels nobody
        first = self.pointer + (pushed - len(kept))
        slots = (first + torch.arange(len(kept), device=self.keys.device)) % size
        self.keys.index_copy_(0, slots, kept.to(self.keys.dtype))
        self.pointer.add_(pushed).remainder_(size)
