"""AlexNet and VGG16 as DeepCluster has them, and their Sobel front end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pydantic import ValidationError
from scipy import ndimage
from torch import nn

from mvmr.nets.cards import EncoderCard
from mvmr.nets.encoders import PLAIN, EncoderConfig, build_encoder
from mvmr.nets.plain import LAYOUTS, PlainNet, Sobel
from mvmr.nets.weights import load_encoder, save_encoder
from mvmr.types import UserError


def shapes(net: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(type(m).__name__, tuple(m.weight.shape)) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def on_meta(name: str, *, sobel: bool) -> PlainNet:
    with torch.device("meta"):
        return PlainNet(LAYOUTS[name], sobel=sobel)


def test_alexnet_is_the_papers() -> None:
    net = on_meta("alexnet", sobel=True)
    assert shapes(net) == [
        ("Conv2d", (96, 2, 11, 11)),
        ("Conv2d", (256, 96, 5, 5)),
        ("Conv2d", (384, 256, 3, 3)),
        ("Conv2d", (384, 384, 3, 3)),
        ("Conv2d", (256, 384, 3, 3)),
        ("Linear", (4096, 256 * 36)),
        ("Linear", (4096, 4096)),
    ]
    assert [type(m).__name__ for m in net.classifier] == ["Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert net.dim == 4096


def test_vgg_is_torchvisions_without_its_last_layers() -> None:
    with torch.device("meta"):
        reference = torchvision.models.vgg16_bn()
    net = on_meta("vgg16", sobel=False)
    expected = {key: value.shape for key, value in reference.state_dict().items() if not key.startswith("classifier.6")}
    assert {key: value.shape for key, value in net.state_dict().items()} == expected


@pytest.mark.parametrize(("name", "side"), [("alexnet", 6), ("vgg16", 7)])
def test_convolutions_end_at_the_grid_by_themselves(name: str, side: int) -> None:
    net = PlainNet(LAYOUTS[name], width=0.05, sobel=True).eval()
    maps = net.features(net.sobel(torch.randn(1, 3, 224, 224)))
    assert maps.shape[2:] == (side, side)
    assert torch.equal(net.avgpool(maps), maps)


@pytest.mark.parametrize("name", PLAIN)
def test_features_are_those_before_the_relu(name: str) -> None:
    net, dim = build_encoder(EncoderConfig(name=name, width=0.05, sobel=True), side=64)
    features = net(torch.randn(4, 3, 64, 64))
    assert features.shape == (4, dim) == (4, 205)
    assert features.min() < 0
    features.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_sobel_is_scipys() -> None:
    images = torch.randn(2, 3, 9, 11)
    found = Sobel()(images)
    for image, maps in zip(images.numpy(), found.numpy(), strict=True):
        grey = image.mean(0)
        for axis, derivative in zip((1, 0), maps, strict=True):
            expected = -ndimage.sobel(grey, axis=axis, mode="constant")
            np.testing.assert_allclose(derivative, expected, atol=1e-5)


def test_sobel_of_a_constant_image_is_zero_inside_and_has_nothing_to_learn_or_keep() -> None:
    sobel = Sobel()
    maps = sobel(torch.full((1, 3, 8, 8), 5.0))
    assert maps[:, :, 1:-1, 1:-1].abs().max() == 0
    assert maps[:, :, 0].abs().max() > 0, "outside is black"
    assert list(sobel.parameters()) == []
    assert sobel.state_dict() == {}
    colours = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(sobel(colours[:, [2, 0, 1]]), sobel(colours))


def test_a_saved_encoder_is_read_back_and_takes_images(tmp_path: Path) -> None:
    config = EncoderConfig(name="alexnet", width=0.05, sobel=True)
    net, dim = build_encoder(config)
    card = EncoderCard(
        encoder=config, dim=dim, image_size=64, mean=(0.5,) * 3, std=(0.2,) * 3, method="deepcluster", data="digits",
        version="0",
    )  # fmt: skip
    loaded = load_encoder(save_encoder(tmp_path, net, card))
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net.eval()((images / 255 - 0.5) / 0.2))


@pytest.mark.parametrize(("name", "least"), [("alexnet", 63), ("vgg16", 32)])
def test_images_that_would_vanish_are_refused(name: str, least: int) -> None:
    config = EncoderConfig(name=name, width=0.05)
    net, dim = build_encoder(config, side=least)
    assert net.eval()(torch.zeros(1, 3, least, least)).shape == (1, dim)
    for sides in ({"side": least - 1}, {"side": 224, "local_sides": [least - 1]}):
        with pytest.raises(UserError, match=rf"encoder\.name={name}.*views of {least - 1}.*views\.size={least}"):
            build_encoder(config, **sides)
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 3, least - 1, least - 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet18", "sobel": True}, r"encoder\.sobel .*resnet18, but applies to alexnet and vgg16 only"),
        ({"name": "timm:resnet18", "sobel": True}, r"encoder\.sobel"),
        ({"name": "alexnet", "stem": "cifar"}, r"encoder\.stem .* ResNets only"),
        ({"name": "vgg16", "drop_path": 0.1}, r"encoder\.drop_path .* timm models only"),
        ({"name": "alexnett"}, "alexnet"),
    ],
)
def test_settings_that_do_not_apply_are_refused(settings: dict, message: str) -> None:
    with pytest.raises((UserError, ValidationError), match=message):
        EncoderConfig(**settings)
