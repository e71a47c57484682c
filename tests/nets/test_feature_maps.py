"""Maps between stages: what they hold, at which strides, and of which backbones."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.feature_maps import FeatureMaps
from mvmr.types import UserError


@pytest.mark.parametrize(
    ("stem", "strides"), [("imagenet", (4, 8, 16, 32)), ("cifar", (1, 2, 4, 8)), ("mvmr", (2, 4, 8, 16))]
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_strides_and_channels(name: str, stem: str, strides: tuple[int, ...]) -> None:
    backbone, dim = build_encoder(EncoderConfig(name=name, stem=stem, width=0.0625))
    maps = FeatureMaps(backbone)
    assert maps.strides == strides
    assert maps.channels == tuple(dim // 8 * 2**stage for stage in range(4))
    found = maps(torch.rand(2, 3, 96, 64))
    assert list(found) == ["stage1", "stage2", "stage3", "stage4"]
    for each, stride, channels in zip(found.values(), strides, maps.channels, strict=True):
        assert each.shape == (2, channels, 96 // stride, 64 // stride)


def test_the_last_map_is_what_the_encoder_averages() -> None:
    backbone, _ = build_encoder(EncoderConfig(width=0.125, stem="cifar", zero_init_residual=False))
    backbone.train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    maps = FeatureMaps(backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(part.training for part in backbone.modules())
    backbone.eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(maps(images)["stage4"].mean((2, 3)), backbone(images))
    three = FeatureMaps(backbone, stages=3)
    assert (three.strides, three.rest) == ((1, 2, 4), (backbone.layer4,))
    assert not {id(p) for p in backbone.layer4.parameters()} & {id(p) for p in three.parameters()}
    torch.testing.assert_close(backbone.layer4(three(images)["stage3"]), maps(images)["stage4"])


def test_torchvision_and_timm() -> None:
    own = torchvision.models.resnet18().eval()
    maps = FeatureMaps(own)
    assert (maps.strides, maps.channels) == ((4, 8, 16, 32), (64, 128, 256, 512))
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(own.fc(maps(images)["stage4"].mean((2, 3))), own(images))
    for name in ("resnet10t", "convnext_atto", "mobilenetv3_small_050"):
        net = timm.create_model(name, num_classes=0).eval()
        maps = FeatureMaps(net)
        assert maps.strides == (4, 8, 16, 32)
        reference = timm.create_model(name, features_only=True).feature_info.channels()
        assert maps.channels == tuple(reference[-4:])
        with torch.no_grad():
            assert [each.shape[1] for each in maps(images).values()] == list(maps.channels)


def test_what_has_no_stages_is_refused() -> None:
    transformer = timm.create_model("test_vit", num_classes=0)
    for backbone in (transformer, nn.Sequential(nn.Conv2d(3, 4, 3)), build_encoder(EncoderConfig(name="alexnet"))[0]):
        with pytest.raises(UserError, match=r"resnet18, resnet34 and resnet50 with any stem.*not vision transformers"):
            FeatureMaps(backbone)


def test_what_takes_one_size_only_is_refused() -> None:
    """Swin has stages and maps, and an assertion about its input."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, embed_dim=12, depths=(1, 1, 1, 1),
                             num_heads=(1, 2, 2, 4))  # fmt: skip
    swin.train()
    with pytest.raises(UserError, match=r"does not take images of 128 x 128 pixels .*224.*Swin"):
        FeatureMaps(swin)
    assert all(part.training for part in swin.modules())
