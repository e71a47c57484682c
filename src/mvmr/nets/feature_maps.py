"""The maps between a backbone's stages, for tasks that need to know where things are."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from mvmr.ops.modes import evaluating
from mvmr.types import UserError

PROBE = 128
"""Side of the image by which strides are measured; a multiple of every stride."""
STAGES = ("layer1", "layer2", "layer3", "layer4")
SUPPORTED = (
    "resnet18, resnet34 and resnet50 with any stem, torchvision's ResNets, and models of timm with four stages or "
    "more, such as ResNets, ConvNeXts and EfficientNets (not vision transformers, whose maps have one size, nor those "
    "that take images of one size only, such as Swin, MaxViT and CoAtNet)"
)


class FeatureMaps(nn.Module):
    """Normalised images [B, 3, H, W] -> {"stage1": [B, C1, H / s1, W / s1], ...}, the outputs of a backbone's stages.

    Holds the very parts of the backbone that it needs and no others: give a copy where that shall stay as it is. Its
    modes and buffers are left alone. Raises UserError for a backbone without stages.
    """

    strides: tuple[int, ...]
    """Of each map, measured."""
    channels: tuple[int, ...]
    """Of each map, measured."""

    def __init__(self, backbone: nn.Module, *, stages: int = 4):
        """stages: how many from the first on; fewer leave the last parts of a ResNet out, which are then in `rest`."""
        super().__init__()
        self.rest: tuple[nn.Module, ...] = ()  # a tuple, so that they are no parts of this module
        self._indices: list[int] | None = None
        if all(isinstance(getattr(backbone, name, None), nn.Module) for name in ("conv1", "bn1", *STAGES)):
            first = [getattr(backbone, name, None) for name in ("conv1", "bn1", "relu", "act1", "maxpool")]
            self.stem = nn.Sequential(*(part for part in first if part is not None))
            self.stages = nn.ModuleList([getattr(backbone, name) for name in STAGES[:stages]])
            self.rest = tuple(getattr(backbone, name) for name in STAGES[stages:])
        else:
            self._indices = _stage_indices(backbone)[-4:][:stages]
            self.whole: Any = backbone
        self._measure()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if self._indices is not None:
            maps = self.whole.forward_intermediates(images, indices=self._indices, intermediates_only=True)
        else:
            x, maps = self.stem(images), []
            for stage in self.stages:
                x = stage(x)
                maps.append(x)
        return OrderedDict((f"stage{number}", each) for number, each in enumerate(maps, 1))

    @torch.no_grad()
    def _measure(self) -> None:
        weight = next(self.parameters())
        try:
            with evaluating(self):
                maps = list(self(weight.new_zeros(1, 3, PROBE, PROBE)).values())
        except (AssertionError, RuntimeError, ValueError) as error:  # whatever a net that has one size raises
            raise UserError(
                f"this backbone does not take images of {PROBE} x {PROBE} pixels ({error}), and tasks with maps have "
                f"images of any size; feature maps are taken of {SUPPORTED}"
            ) from None
        sides = [each.shape[-1] for each in maps]
        if any(each.ndim != 4 or PROBE % each.shape[-1] for each in maps) or len(set(sides)) < len(sides):
            raise UserError(f"the maps of this backbone have the sides {sides}; feature maps are taken of {SUPPORTED}")
        self.strides = tuple(PROBE // side for side in sides)
        self.channels = tuple(each.shape[1] for each in maps)


def _stage_indices(backbone: nn.Module) -> list[int]:
    """Of a timm model: the numbers of its intermediate maps, one a resolution."""
    info = getattr(backbone, "feature_info", None)
    if info is None or not callable(getattr(backbone, "forward_intermediates", None)):
        raise UserError(
            f"{type(backbone).__name__} has no stages to take maps from; feature maps are taken of {SUPPORTED}"
        )
    known = info if isinstance(info, list) else info.info
    last = {each["reduction"]: number for number, each in enumerate(known)}  # the deepest of each resolution
    if len(last) < 4:
        raise UserError(
            f"{type(backbone).__name__} has maps of {len(last)} resolution(s); feature maps are taken of {SUPPORTED}"
        )
    return sorted(last.values())
