"""A tiny OSS in float64, its batches, and losses by loops, for the tests of its terms and of its options."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mvmr.methods.oss import OSS, OSSConfig
from mvmr.ops.sinkhorn import sinkhorn
from mvmr.types import Batch, Step
from pool import Pool

TEACHER = {"name": "resnet18", "stem": "cifar", "width": 0.0625, "zero_init_residual": False}
SMALL: dict[str, Any] = {
    "teacher": TEACHER, "teacher_hidden": 11, "student_hidden": 12, "dim": 6, "prototypes": 9,
    "queue": 0, "classifier_hidden": 7, "freeze_prototypes_epochs": 0,
}  # fmt: skip
B, V = 4, 3


def method(**settings: Any) -> OSS:
    torch.manual_seed(0)
    return OSS(Pool(), 5, OSSConfig.model_validate({**SMALL, **settings})).double().train()


def batch(*, small: int = V, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {"global": torch.randn(2, B, 3, 8, 8, generator=generator, dtype=torch.float64)}
    if small:
        views["local"] = torch.randn(small, B, 3, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(torch.arange(B), views)


def step(at: int = 0) -> Step:
    return Step(at, 20, 5)


def of(oss: OSS, given: Batch, at: Step | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(embeddings, terms) with equal dropout at every call."""
    torch.manual_seed(7)
    embeddings = oss.embed(given)
    return embeddings, oss.objective(embeddings, given, at or step())


def gradients(oss: OSS, given: Batch) -> dict[str, Tensor]:
    oss.zero_grad()
    of(oss, given)[1]["loss"].backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in oss.named_parameters()}


def cross_entropy(u: Tensor, c: Tensor, q: Tensor) -> float:
    """L_c of Eq. 3 at tau = 0.1, number by number: u [d], C [K, d], q [K]."""
    e = [math.exp(float(u @ row) / 0.1) for row in c]
    return -sum(float(q[k]) * math.log(e[k] / sum(e)) for k in range(len(c)))


def codes_by_hand(z: Tensor, c: Tensor) -> Tensor:
    return torch.stack([sinkhorn(z[:, i] @ c.T, epsilon=0.05) for i in range(2)], dim=1)  # [B, 2, K]


def of_network(z: Tensor, dropped: Tensor, c: Tensor, q: Tensor) -> float:
    """Eq. 2 (or 4) and Eq. 5 as a sum over terms, averaged over images: [B, 2 + V, d] twice."""
    total = 0.0
    for n in range(B):
        total += cross_entropy(z[n, 0], c, q[n, 1]) + cross_entropy(z[n, 1], c, q[n, 0])
        for i in range(2):
            total += sum(cross_entropy(dropped[n, v], c, q[n, i]) for v in range(dropped.shape[1]))
            total += sum(cross_entropy(z[n, v], c, q[n, i]) for v in range(2, z.shape[1]))
    return total / B
