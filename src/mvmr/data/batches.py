"""From loaded images to a method's batch: views and representations, made on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvmr.data.loading import Loaded
from mvmr.data.views import ViewMaker
from mvmr.types import Batch


class BatchMaker:
    """Makes views and representations of loaded images; a pure function of (seed, epoch, image)."""

    def __init__(self, views: ViewMaker, representations: nn.ModuleDict):
        self.views = views
        self.representations = representations

    def to(self, device: torch.device) -> BatchMaker:
        self.representations.to(device)
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
        views = self.views(on_device, loaded.index, loaded.epoch)
        features = self.features(views["plain"][0], loaded.index, loaded.epoch)
        return Batch(index=loaded.index, views=views, representations=features)

    def features(self, plain: Tensor, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """{name: [B, F]} of plain, normalised images [B, 3, S, S]."""
        return {name: representation(plain, index, epoch) for name, representation in self.representations.items()}
