"""SwAV's prototypes and the codes that images get by them (Caron et al., NeurIPS 2020, Section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mvmr.ops.collectives import rank, world_size
from mvmr.ops.queue import Queue
from mvmr.ops.sinkhorn import sinkhorn


class ClusterPrototypes(nn.Module):
    """Scores z^T c_k of K directions of unit norm, without bias: [..., D] -> [..., K].

    The rows of `weight` have norm 1 from the start, and `renormalise` after every optimiser step brings them back,
    which is SwAV's normalisation before every forward pass. Unlike in weight norm, the gradient is with respect to
    the unit rows and may have a part along them. Computed in float32 (or float64) outside autocast.
    """

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))  # nn.Linear's start
        self.renormalise()

    def forward(self, z: Tensor, *, learn: bool = True) -> Tensor:
        """learn: False keeps the gradient of these scores from the prototypes."""
        weight = self.weight if learn else self.weight.detach()
        with torch.autocast(z.device.type, enabled=False):
            return functional.linear(z.to(weight.dtype), weight)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Every row to norm 1, in place."""
        self.weight.copy_(functional.normalize(self.weight, dim=1))


class CodeMaker(nn.Module):
    """The codes q of A views of every image (Eqs. 3 to 5), and the queue of past embeddings that help a small batch.

    The queue holds the last `size` images' embeddings of the A views, equal on all ranks; 0: none. It starts with
    zeros and is used once it is full, as in the released code. The codes of one view are a transport of their own.
    """

    def __init__(self, dim: int, *, views: int = 2, size: int = 0, epsilon: float = 0.05, iterations: int = 3):
        super().__init__()
        self.views, self.epsilon, self.iterations = views, epsilon, iterations
        self.queue = Queue(size, views * dim) if size else None
        if self.queue is not None:
            self.queue.keys.zero_()

    @torch.no_grad()
    def forward(self, z: Tensor, prototypes: ClusterPrototypes) -> Tensor:
        """This rank's embeddings [B, A, D] of norm 1 -> codes [B, A, K], each a distribution; collective."""
        past = self._past()  # [n, A, D]
        codes = []
        for view in range(self.views):
            rows = z[:, view] if past is None else torch.cat([past[:, view].to(z.dtype), z[:, view]])
            q = sinkhorn(prototypes(rows), epsilon=self.epsilon, iterations=self.iterations)
            codes.append(q[len(q) - len(z) :])  # [B, K]
        return torch.stack(codes, dim=1)

    def push(self, z: Tensor) -> None:
        """Embeddings [N, A, D] of all ranks' images into the queue, if there is one; after the step."""
        if self.queue is not None:
            self.queue.push(z.flatten(1))

    def _past(self) -> Tensor | None:
        """This rank's part of a full queue, [n, A, D]: each row takes part once, on one rank."""
        # The ring is filled from the front. Asking waits for the device, once a step.
        if self.queue is None or not bool(self.queue.keys[-1].any()):
            return None
        return self.queue.keys[rank() :: world_size()].unflatten(1, (self.views, -1))
