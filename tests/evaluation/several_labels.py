"""Features of images that may show several classes each."""

from __future__ import annotations

import torch

from mvmr.types import Features

NAMES = ("ant", "bee", "cat", "dog")


def some_features(
    seed: int = 0, *, count: int = 300, noise: float = 1.0, unknown: float = 0.1
) -> tuple[Features, Features]:
    """Two splits of correlated features with four classes of different frequency, and a share of the labels unknown."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 24, generator=torch.Generator().manual_seed(9))
    parts = []
    for _ in range(2):
        latent = torch.randn(count, 6, generator=generator)
        x = (latent @ mixing + 0.5 * torch.randn(count, 24, generator=generator)).relu()
        margin = latent[:, :4] + noise * torch.randn(count, 4, generator=generator)
        y = (margin > torch.tensor([0.0, 0.7, 1.5, 2.2])).to(torch.int8)
        y[torch.rand(count, 4, generator=generator) < unknown] = -1
        parts.append(Features(x, y, NAMES))
    return parts[0], parts[1]
