"""From loaded images to a method's batch: views and representations, made on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mvmr.data.loading import Loaded
from mvmr.data.views import ViewMaker
from mvmr.types import Batch

Rows = Callable[[Tensor, torch.device], Tensor]
"""rows(index [B] int64, device) -> [B, F] float32: what is kept of one representation of the images at `index`."""


class BatchMaker:
    """Makes views and representations of loaded images; a pure function of (seed, epoch, image)."""

    def __init__(self, views: ViewMaker, representations: nn.ModuleDict):
        self.views = views
        self.representations = representations
        self.kept: dict[str, Rows] = {}
        """Representations that are looked up instead of computed, by name."""

    def to(self, device: torch.device) -> BatchMaker:
        for name, representation in self.representations.items():
            if name not in self.kept:  # a teacher that is looked up stays where it is
                representation.to(device)
        return self

    @torch.no_grad()
    def __call__(self, loaded: Loaded, device: torch.device | str = "cpu") -> Batch:
        """Batch on `device`; the index stays on the CPU, where the views' parameters are drawn."""
        images = loaded.images
        on_device: Tensor | dict[str, Tensor]
        if isinstance(images, dict):
            on_device = {name: crop.to(device, non_blocking=True) for name, crop in images.items()}
        else:
            on_device = images.to(device, non_blocking=True)
        views = self.views(on_device, loaded.drawn, loaded.epoch)
        features = self.features(views["plain"][0], loaded.index, loaded.epoch)
        return Batch(index=loaded.index, views=views, representations=features)

    @torch.no_grad()
    def features(self, plain: Tensor, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """{name: [B, F]} of plain, normalised images [B, 3, S, S]."""
        return {
            name: self.kept[name](index, plain.device) if name in self.kept else representation(plain, index, epoch)
            for name, representation in self.representations.items()
        }
