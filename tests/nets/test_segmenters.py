"""Dilated backbones against the ones they are made of, and the head on them."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models._utils import IntermediateLayerGetter

from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.segmenters import build_segmenter, dilate_last_stage
from mvmr.nets.teachers import resnet_map
from mvmr.types import UserError


def encoder(name: str = "resnet18", stem: str = "imagenet", width: float = 0.125) -> Encoder:
    torch.manual_seed(0)
    given = {} if name.startswith("timm:") else {"stem": stem, "width": width, "zero_init_residual": False}
    config = EncoderConfig(name=name, **given)
    backbone, dim = build_encoder(config)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    card = EncoderCard(encoder=config, dim=dim, image_size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
                       method="m", data="d", version="0")  # fmt: skip
    return Encoder(backbone, card).eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("stem", "side"), [("imagenet", 96), ("imagenet", 80), ("cifar", 40), ("mvmr", 44)])
def test_the_dilated_stage_has_the_plain_ones_values_at_every_second_place(name: str, stem: str, side: int) -> None:
    plain = encoder(name, stem).backbone.double()
    dilated = copy.deepcopy(plain)
    dilate_last_stage(dilated, like="torchvision")
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        small, large = resnet_map(plain, images), resnet_map(dilated, images)
        before = plain.layer3(plain.layer2(plain.layer1(plain.maxpool(plain.relu(plain.bn1(plain.conv1(images)))))))
    assert large.shape[2:] == before.shape[2:]
    assert small.shape[2:] == tuple((length + 1) // 2 for length in large.shape[2:])
    torch.testing.assert_close(large[:, :, ::2, ::2], small)
    assert dilated.state_dict().keys() == plain.state_dict().keys()


def test_bottlenecks_are_dilated_as_torchvisions_own() -> None:
    plain = torchvision.models.resnet50(weights=None, width_per_group=4)
    reference = torchvision.models.resnet50(
        weights=None, width_per_group=4, replace_stride_with_dilation=[False, False, True]
    )
    reference.load_state_dict(plain.state_dict())
    dilate_last_stage(plain, like="torchvision")
    images = torch.randn(1, 3, 64, 64)
    expected = IntermediateLayerGetter(reference.eval(), {"layer4": "out"})(images)["out"]
    assert torch.equal(resnet_map(plain.eval(), images), expected)


@pytest.mark.parametrize(("name", "kernels"), [("resnet18", 4), ("resnet50", 3)])
def test_moco_dilates_every_3x3_convolution_of_the_stage(name: str, kernels: int) -> None:
    backbone = encoder(name).backbone
    others = [str(part) for part in (backbone.conv1, backbone.layer1, backbone.layer2, backbone.layer3)]
    dilate_last_stage(backbone, like="moco")
    convolutions = [part for part in backbone.layer4.modules() if isinstance(part, nn.Conv2d)]
    assert {part.stride for part in convolutions} == {(1, 1)}
    wide = [part for part in convolutions if part.kernel_size == (3, 3)]
    assert len(wide) == kernels
    assert {(part.dilation, part.padding) for part in wide} == {((2, 2), (2, 2))}
    assert others == [str(part) for part in (backbone.conv1, backbone.layer1, backbone.layer2, backbone.layer3)]


def test_the_reach_of_a_stage_is_the_sum_of_its_dilations() -> None:
    """Without norms and with all kernels 1 nothing cancels: what a point touches is what sees it."""
    reach = {}
    for like in ("moco", "torchvision"):
        stage = encoder("resnet18").backbone.double()
        dilate_last_stage(stage, like=like)  # type: ignore[arg-type]
        for part in list(stage.layer4.modules()):
            if isinstance(part, nn.Conv2d):
                nn.init.ones_(part.weight)
            for name, child in part.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(part, name, nn.Identity())
        point = torch.zeros(1, 32, 31, 31, dtype=torch.float64)
        point[0, 0, 15, 15] = 1.0
        seen = stage.layer4(point)[0, 0] > 0
        reach[like] = int(seen.any(0).nonzero().max()) - 15
    assert reach == {"moco": 2 + 2 + 2 + 2, "torchvision": 1 + 2 + 2 + 2}


@pytest.mark.parametrize("dilation", ["moco", "torchvision", "none"])
def test_scores_are_as_large_as_the_images_and_normalised_by_the_card(dilation: str) -> None:
    given = encoder(stem="cifar")
    before = copy.deepcopy(given.state_dict())
    segmenter = build_segmenter(given, 5, dilation=dilation, channels=12, seed=3).eval()  # type: ignore[arg-type]
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    scores = segmenter(images)
    assert (scores.shape, scores.dtype) == ((2, 5, 40, 48), torch.float32)
    assert segmenter.scores(images).shape[2:] == ((5, 6) if dilation == "none" else (10, 12))
    normalised = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    x = resnet_map(segmenter.backbone, normalised)
    for convolution, norm in ((segmenter.head[0], segmenter.head[1]), (segmenter.head[3], segmenter.head[4])):
        assert (convolution.dilation, convolution.out_channels) == ((6, 6), 12)
        x = functional.relu(norm(functional.conv2d(x, convolution.weight, padding=6, dilation=6)))
    x = functional.conv2d(x, segmenter.head[6].weight, segmenter.head[6].bias)
    expected = functional.interpolate(x, size=(40, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(segmenter(images.float() / 255), scores)
    same = build_segmenter(given, 5, dilation=dilation, channels=12, seed=3)  # type: ignore[arg-type]
    assert torch.equal(same.head[0].weight, segmenter.head[0].weight)
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in before.items())
    segmenter.backbone.conv1.weight.data.zero_()
    assert torch.equal(given.backbone.conv1.weight, before["backbone.conv1.weight"])


def test_a_bottleneck_has_a_head_of_its_width() -> None:
    given = encoder("resnet50", stem="cifar", width=0.0625)
    segmenter = build_segmenter(given, 3, channels=6).eval()
    assert segmenter.head[0].in_channels == given.card.dim == 128
    assert segmenter(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert build_segmenter(given, 3, convolutions=0).head[0].in_channels == 128


def test_heads_of_other_depths_and_other_encoders() -> None:
    linear = build_segmenter(encoder(), 4, convolutions=0)
    assert [type(layer) for layer in linear.head] == [nn.Conv2d]
    assert linear(torch.rand(1, 3, 64, 64)).shape == (1, 4, 64, 64)
    with pytest.raises(UserError, match=r"ResNets only, and this encoder is timm:test_vit; take resnet18"):
        build_segmenter(encoder("timm:test_vit"), 4)
    torchvisions = Encoder(torchvision.models.resnet18(weights=None), encoder().card)
    assert build_segmenter(torchvisions, 3)(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
