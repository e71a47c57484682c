"""ResNets of torchvision's blocks, with other stems and widths, under torchvision's parameter names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


class Layout(NamedTuple):
    """What tells the ResNets apart: the kind of block and how many of them each stage has."""

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, int, int, int]


LAYOUTS: dict[str, Layout] = {
    "resnet18": Layout(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Layout(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Layout(Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """ResNet without classifier (He et al., CVPR 2016, Table 1): normalised [B, 3, H, W] -> [B, dim].

    At width 1 with the imagenet stem it computes what torchvision's model of the same name does, and its state_dict
    loads there with strict=True once `fc` is Identity. `width` scales the channels of every stage.
    """

    def __init__(self, layout: Layout, *, stem: str = "imagenet", width: float = 1.0, zero_init_residual: bool = True):
        super().__init__()
        channels = max(1, round(64 * width))
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)

        stages, incoming = [], channels
        for stage, count in enumerate(layout.blocks):
            planes = channels * 2**stage
            stages.append(_stage(layout.block, count, incoming, planes, stride=1 if stage == 0 else 2))
            incoming = planes * layout.block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dim = incoming
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:  # every block starts as the identity (Goyal et al., 2017, section 5.1)
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    nn.init.zeros_(module.bn2.weight)
                elif isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # [B, C, h, w]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, dim, h, w]
        return torch.flatten(self.avgpool(x), 1)  # [B, dim]


def _stage(
    block: type[BasicBlock | Bottleneck], count: int, incoming: int, planes: int, *, stride: int
) -> nn.Sequential:
    outgoing = planes * block.expansion
    downsample = None
    if stride != 1 or incoming != outgoing:
        downsample = nn.Sequential(conv1x1(incoming, outgoing, stride), nn.BatchNorm2d(outgoing))
    first = block(incoming, planes, stride, downsample)
    return nn.Sequential(first, *(block(outgoing, planes) for _ in range(count - 1)))
