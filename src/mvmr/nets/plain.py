"""AlexNet and VGG16 with batch norm, as DeepCluster trains them (Caron et al., ECCV 2018, Section 3.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(NamedTuple):
    """One convolution, followed by batch norm, ReLU and, where `pool` is given, by max-pooling."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int | None = None
    """Side of the pooling's window; its stride is 2."""


class Layout(NamedTuple):
    """What tells the two networks apart."""

    convolutions: tuple[Conv, ...]
    grid: int
    """Side of the map that the hidden layers get; at 224 pixels the convolutions end there by themselves."""
    dropout_first: bool
    """Dropout before the first hidden layer, too."""
    least_side: int
    """Pixels; smaller images vanish in the pooling."""


HIDDEN = 4096
LAYOUTS: dict[str, Layout] = {
    "alexnet": Layout(
        (Conv(96, 11, 4, 2, pool=3), Conv(256, 5, 1, 2, pool=3), Conv(384), Conv(384), Conv(256, pool=3)),
        grid=6, dropout_first=True, least_side=63,
    ),
    "vgg16": Layout(
        (
            Conv(64), Conv(64, pool=2), Conv(128), Conv(128, pool=2), Conv(256), Conv(256), Conv(256, pool=2),
            Conv(512), Conv(512), Conv(512, pool=2), Conv(512), Conv(512), Conv(512, pool=2),
        ),
        grid=7, dropout_first=False, least_side=32,
    ),
}  # fmt: skip


class Sobel(nn.Module):
    """The grey image's derivatives along both axes: [B, 3, H, W] -> [B, 2, H, W], fixed (DeepCluster, Section 3.4).

    Grey is the mean of the three channels as they come, so after normalisation; outside the image it is 0. Has no
    parameter, and nothing in the state_dict.
    """

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernels", torch.stack([across, across.T]).unsqueeze(1), persistent=False)  # [2, 1, 3, 3]

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images.mean(1, keepdim=True), self.kernels.to(images.dtype), padding=1)


class PlainNet(nn.Module):
    """Convolutions and two hidden layers: normalised [B, 3, H, W] -> [B, dim], before the last hidden layer's ReLU.

    That is what DeepCluster clusters; its classifier stands behind the ReLU. At width 1 dim is 4096 and `features` and
    `classifier` have the layout of the released networks, and those of torchvision's but for AlexNet's widths.
    width: scales the channels of every layer. sobel: see `Sobel`. Maps of images that are not of 224 pixels are
    averaged or repeated to the grid that the first hidden layer expects, as in torchvision.
    """

    def __init__(self, layout: Layout, *, width: float = 1.0, sobel: bool = False):
        super().__init__()
        self.sobel = Sobel() if sobel else nn.Identity()
        layers: list[nn.Module] = []
        incoming = 2 if sobel else 3
        for conv in layout.convolutions:
            channels = max(1, round(conv.channels * width))
            layers.append(nn.Conv2d(incoming, channels, conv.kernel, stride=conv.stride, padding=conv.padding))
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if conv.pool:
                layers.append(nn.MaxPool2d(conv.pool, stride=2))
            incoming = channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(layout.grid)
        self.dim = max(1, round(HIDDEN * width))
        hidden = [nn.Linear(incoming * layout.grid**2, self.dim), nn.ReLU(inplace=True), nn.Dropout(0.5)]
        before = [nn.Dropout(0.5)] if layout.dropout_first else []
        self.classifier = nn.Sequential(*before, *hidden, nn.Linear(self.dim, self.dim))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al., ICCV 2015, by the number of outputs
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.avgpool(self.features(self.sobel(images)))  # [B, C, grid, grid]
        return self.classifier(torch.flatten(x, 1))  # [B, dim]
