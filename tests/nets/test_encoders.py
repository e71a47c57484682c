from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from mvmr.config import parse
from mvmr.nets.encoders import RESNETS, EncoderConfig, build_encoder
from mvmr.types import UserError


def without_classifier(name: str) -> nn.Module:
    net = torchvision.models.get_model(name, weights=None)
    net.fc = nn.Identity()
    return net


@pytest.mark.parametrize("name", RESNETS)
def test_loads_strictly_into_torchvision_and_computes_the_same(name: str) -> None:
    net, dim = build_encoder(EncoderConfig(name=name, zero_init_residual=False))
    for module in net.modules():  # statistics that a swapped or missing norm could not hide behind
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    reference = without_classifier(name)
    reference.load_state_dict(net.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    features = net.eval()(images)
    assert features.shape == (2, dim)
    assert torch.equal(features, reference.eval()(images))


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_has_torchvisions_names_and_parameter_count(name: str, dim: int) -> None:
    net, width = build_encoder(EncoderConfig(name=name))
    reference = without_classifier(name)
    assert width == dim
    assert list(net.state_dict()) == list(reference.state_dict())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(
    ("stem", "after_stem", "last"), [("imagenet", 16, 2), ("mvmr", 32, 4), ("cifar", 64, 8)]
)  # the side of the maps, of 64-pixel images
def test_stems_keep_the_resolution_that_they_promise(stem: str, after_stem: int, last: int) -> None:
    net, dim = build_encoder(EncoderConfig(stem=stem, width=0.125))
    sides = {}
    net.maxpool.register_forward_hook(lambda module, inputs, output: sides.update(stem=output.shape[-1]))
    net.layer4.register_forward_hook(lambda module, inputs, output: sides.update(last=output.shape[-1]))
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, dim)
    assert sides == {"stem": after_stem, "last": last}
    assert net.conv1.kernel_size == ((7, 7) if stem == "imagenet" else (3, 3))


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize("width", [0.25, 0.7, 2.0])
def test_width_scales_every_stage(name: str, expansion: int, width: float) -> None:
    net, dim = build_encoder(EncoderConfig(name=name, width=width))
    base = round(64 * width)
    assert net.conv1.out_channels == base
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    assert [stage[-1].conv1.out_channels for stage in stages] == [base, 2 * base, 4 * base, 8 * base]
    assert dim == 8 * base * expansion
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, dim)


@pytest.mark.parametrize(("name", "last_norm"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_residual_blocks_start_as_the_identity_if_asked(name: str, last_norm: str) -> None:
    for zero in (True, False):
        net, _ = build_encoder(EncoderConfig(name=name, width=0.25, zero_init_residual=zero))
        weights = [p for key, p in net.named_parameters() if key.endswith(f"{last_norm}.weight")]
        assert len(weights) == sum(map(len, (net.layer1, net.layer2, net.layer3, net.layer4)))
        assert all(bool((w == (0.0 if zero else 1.0)).all()) for w in weights)


def test_convolutions_are_initialised_by_he_fan_out() -> None:
    torch.manual_seed(0)
    net, _ = build_encoder(EncoderConfig(name="resnet18"))
    weight = net.layer4[1].conv2.weight  # 2.4 million draws of variance 2 / (3 * 3 * 512)
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=5e-3)
    assert abs(weight.mean().item()) < 1e-4


def test_the_seed_alone_decides_the_weights() -> None:
    nets = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        nets.append(build_encoder(EncoderConfig(width=0.125))[0].conv1.weight)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_timm_vision_transformer_of_another_size() -> None:
    net, dim = build_encoder(EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=32))
    assert dim == 192
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    assert all(module.training for module in net.modules())


def test_timm_width_is_that_of_what_comes_out() -> None:
    # This model's num_features is 288: its head's own layer follows.
    net, dim = build_encoder(EncoderConfig(name="timm:mobilenetv3_small_050"))
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, dim)
    assert dim == 1024


def test_unknown_timm_model_names_close_ones() -> None:
    with pytest.raises(UserError, match=r"timm:vit_tinny_patch16_224.*vit_tiny_patch16_224"):
        build_encoder(EncoderConfig(name="timm:vit_tinny_patch16_224"))


def test_timm_model_without_that_size_or_tag() -> None:
    with pytest.raises(UserError, match=r"encoder\.image_size=32.*resnet10t"):
        build_encoder(EncoderConfig(name="timm:resnet10t", image_size=32))
    with pytest.raises(UserError, match="nosuchtag"):
        build_encoder(EncoderConfig(name="timm:resnet10t.nosuchtag"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet19"}, "did you mean resnet18"),
        ({"name": "timm:"}, "timm:NAME"),
        ({"name": "timm:resnet10t", "stem": "cifar"}, r"encoder\.stem .* ResNets only"),
        ({"name": "timm:resnet10t", "width": 0.5}, r"encoder\.width .* ResNets only"),
        ({"name": "timm:resnet10t", "zero_init_residual": False}, r"encoder\.zero_init_residual .* ResNets only"),
        ({"image_size": 64}, r"encoder\.image_size .* timm models only"),
        ({"width": 0}, "width"),
    ],
)
def test_mistakes_in_the_section(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(**settings)


def test_mistakes_in_a_recipe_are_user_errors() -> None:
    recipe = {"method": "mvmr", "views": {"recipe": "mvmr", "size": 32}}
    with pytest.raises(UserError, match=r"encoder.*encoder\.stem is set with encoder\.name=timm:resnet10t"):
        parse({**recipe, "encoder": {"name": "timm:resnet10t", "stem": "cifar"}})


def test_timm_and_torchvision_are_imported_only_when_used() -> None:
    code = "import sys, mvmr.nets.encoders, mvmr.nets.weights; print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
