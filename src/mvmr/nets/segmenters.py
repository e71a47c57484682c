"""Fully convolutional segmenters (Long et al., CVPR 2015) on pretrained ResNets, as papers on pretraining use them."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mvmr.nets.cards import Encoder, seeded
from mvmr.nets.teachers import resnet_map
from mvmr.types import UserError

Dilation = Literal["moco", "torchvision", "none"]


class Segmenter(nn.Module):
    """A class score for every pixel: uint8 images or float ones in [0, 1], [B, 3, H, W] -> [B, classes, H, W] float32.

    The backbone's last map goes through `convolutions` 3x3 convolutions of `channels` channels and `dilation`, each
    with batch norm and ReLU, and a 1x1 convolution; scores are enlarged bilinearly. MoCo (He et al., CVPR 2020,
    appendix) has two of 256 channels and dilation 6. The 3x3 kernels start by Kaiming's rule, the last at deviation
    0.01 (chosen here).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, encoder: Encoder, classes: int, *, channels: int, convolutions: int, dilation: int
    ):
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        width = _width(backbone)
        for _ in range(convolutions):
            layers += [
                nn.Conv2d(width, channels, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            width = channels
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        last = nn.Conv2d(width, classes, 1)
        nn.init.normal_(last.weight, std=0.01)
        last.bias = nn.Parameter(torch.zeros(classes))
        self.head = nn.Sequential(*layers, last)
        # The card's constants, not weights.
        self.register_buffer("mean", encoder.mean.clone(), persistent=False)
        self.register_buffer("std", encoder.std.clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, classes, H, W]."""
        return functional.interpolate(
            self.scores(images).float(), size=images.shape[-2:], mode="bilinear", align_corners=False
        )

    def scores(self, images: Tensor) -> Tensor:
        """[B, classes, h, w] at the resolution of the backbone's last map."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        normalised = (images - self.mean) / self.std
        return self.head(resnet_map(self.backbone, normalised.to(next(self.head.parameters()).dtype)))


def build_segmenter(
    encoder: Encoder,
    classes: int,
    *,
    dilation: Dilation = "moco",
    channels: int = 256,
    convolutions: int = 2,
    head_dilation: int = 6,
    seed: int = 0,
) -> Segmenter:
    """A segmenter on a copy of the encoder's ResNet, its head drawn under `seed`. Raises UserError for other encoders.

    dilation: as `dilate_last_stage` has it, or "none" for the backbone as it is.
    """
    backbone = copy.deepcopy(encoder.backbone).float()
    if not _is_resnet(backbone):
        raise UserError(
            f"semantic segmentation has heads for ResNets only, and this encoder is {encoder.card.encoder.name}; take "
            "resnet18, resnet34, resnet50 or torchvision:NAME"
        )
    if dilation != "none":
        dilate_last_stage(backbone, like=dilation)
    return seeded(
        lambda: Segmenter(
            backbone, encoder, classes, channels=channels, convolutions=convolutions, dilation=head_dilation
        ),
        seed=seed,
    )


def dilate_last_stage(backbone: nn.Module, *, like: Literal["moco", "torchvision"]) -> None:
    """Stage 4 at stride 1, in place: its map has twice the resolution, and the weights stay.

    "torchvision" (`replace_stride_with_dilation`): 3x3 convolutions behind the former stride get dilation 2, so that at
    every second position the map is that of the stage with its stride, in eval mode. "moco" (He et al., CVPR 2020,
    appendix: all 3x3 convolutions of the stage): also the one that had the stride. Works for basic blocks too, for
    which torchvision's class refuses it.
    """
    behind = like == "moco"
    stage: Any = backbone.layer4
    for block in stage:
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Conv2d):
                continue
            had_stride = layer.stride != (1, 1)
            if had_stride:
                layer.stride = (1, 1)
            if layer.kernel_size == (3, 3):
                if behind:
                    layer.dilation = layer.padding = (2, 2)
                behind = behind or (had_stride and not name.startswith("downsample"))


def _is_resnet(backbone: nn.Module) -> bool:
    # torchvision takes about a second to import, so settings can be read without it.
    from torchvision.models import ResNet as TorchvisionResNet

    from mvmr.nets.resnet import ResNet

    return isinstance(backbone, ResNet | TorchvisionResNet)


def _width(backbone: Any) -> int:
    """Channels of the last map."""
    from torchvision.models.resnet import Bottleneck

    last = backbone.layer4[-1]
    return (last.bn3 if isinstance(last, Bottleneck) else last.bn2).num_features
