from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from mvmr.config import parse
from mvmr.nets.encoders import RESNETS, EncoderConfig, build_encoder
from mvmr.nets.weights import Encoder, EncoderCard, load_encoder, save_encoder
from mvmr.types import Step, UserError
from tiny import parts_and_data, tiny, weights


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


def test_a_vision_transformer_takes_local_views_if_asked() -> None:
    settings = {"name": "timm:vit_tiny_patch16_224", "image_size": 32, "patch_size": 4}
    net, dim = build_encoder(EncoderConfig(**settings, any_size=True), side=32, local_sides=[16, 32])
    assert net(torch.randn(2, 3, 16, 16)).shape == net(torch.randn(2, 3, 32, 32)).shape == (2, dim)
    with pytest.raises(UserError, match=r"views of 16 pixels.*encoder\.any_size=true"):
        build_encoder(EncoderConfig(**settings), side=32, local_sides=[16, 32])
    with pytest.raises(UserError, match=r"views of 14 pixels"):
        build_encoder(EncoderConfig(**settings, any_size=True), side=32, local_sides=[14])
    with pytest.raises(UserError, match=r"encoder\.any_size=True"):
        build_encoder(EncoderConfig(name="timm:resnet10t", any_size=True))
    assert build_encoder(EncoderConfig(width=0.125), local_sides=[14])[1] == 64  # a ResNet takes any size


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
        ({"patch_size": 4}, r"encoder\.patch_size .* timm models only"),
        ({"drop_path": 0.1}, r"encoder\.drop_path .* timm models only"),
        ({"name": "timm:x", "drop_path": 1.0}, "drop_path"),
        ({"name": "timm:x", "patch_size": 5, "image_size": 32}, r"image_size=32 .* encoder\.patch_size=5"),
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


VIT = "timm:vit_tiny_patch16_224"


def small_vit(**changes: object) -> EncoderConfig:
    return EncoderConfig(**{"name": VIT, "patch_size": 4, "image_size": 16, "drop_path": 0.1, **changes})


def test_a_vit_of_other_patches() -> None:
    net, dim = build_encoder(small_vit(), side=16)
    assert net.patch_embed.proj.kernel_size == (4, 4)
    assert net.pos_embed.shape == (1, 1 + 16, dim)
    assert net.training
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, dim) == (2, 192)


def test_paths_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    net, _ = build_encoder(small_vit(drop_path=0.5))
    assert net.blocks[-1].drop_path1.drop_prob == 0.5
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))
    kept, _ = build_encoder(small_vit(drop_path=0.0))
    kept.load_state_dict(net.state_dict())
    assert torch.equal(kept.train()(images), net(images)), "without dropping, training and evaluation agree"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 4}, r"encoder\.patch_size=4: timm's resnet10t .*vision transformer"),
        ({"patch_size": 4, "drop_path": 0.1}, r"^encoder\.patch_size=4: timm's"),
        ({"drop_path": 0.1, "image_size": 32}, r"^encoder\.image_size=32: timm's"),
    ],
)
def test_settings_that_a_timm_model_does_not_take(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(EncoderConfig(name="timm:resnet10t", **settings))
    with pytest.raises(UserError, match=r"encoder\.drop_path=0\.1: .* leave encoder\.drop_path out"):
        build_encoder(EncoderConfig(name="timm:vgg11", drop_path=0.1))


def test_a_model_made_for_another_size_than_the_runs() -> None:
    remedy = r"224 pixels .* of 32 .*set encoder\.image_size=32.*views\.size=224"
    with pytest.raises(UserError, match=remedy):
        build_encoder(EncoderConfig(name=VIT), side=32)
    with pytest.raises(UserError, match=r"16 pixels .* of 32"):
        build_encoder(small_vit(), side=32)
    net, dim = build_encoder(EncoderConfig(name="timm:resnet10t"), side=48)  # takes any size
    assert net(torch.randn(2, 3, 48, 48)).shape == (2, dim)


def test_one_step_of_mvmr_with_a_vit_and_its_file(tmp_path: Path) -> None:
    run = tiny(encoder=small_vit().model_dump(), data__batch_size=4, data__limit=8)
    parts, data = parts_and_data(run)
    before = weights(parts.method)
    optimizer = torch.optim.AdamW(parts.method.parameters(), lr=1e-3)
    parts.method.train().loss(parts.maker(next(iter(data.loader()))), Step(0, 10, 5))["loss"].backward()
    for key, parameter in parts.method.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    optimizer.step()
    moved = {key for key, value in weights(parts.method.encoder).items() if not value.equal(before[f"encoder.{key}"])}
    assert moved == set(dict(parts.method.encoder.named_parameters()))

    file = save_encoder(tmp_path / "encoder.safetensors", parts.method.exported(), parts.card)
    loaded = load_encoder(file)
    assert loaded.card.encoder == small_vit()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(loaded(images), Encoder(parts.method.exported(), parts.card).eval()(images))


def test_a_card_from_before_these_settings_still_loads(tmp_path: Path) -> None:
    config = EncoderConfig(name="timm:resnet10t")
    net, dim = build_encoder(config)
    card = EncoderCard(
        encoder=config, dim=dim, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, method="mvmr", data="x", version="0"
    )
    old = json.loads(card.model_dump_json())
    for key in ("patch_size", "drop_path"):
        del old["encoder"][key]
    file = tmp_path / "encoder.safetensors"
    save_file(net.state_dict(), file, metadata={"mvmr": json.dumps(old)})
    loaded = load_encoder(file)
    assert loaded.card == card
    assert loaded.backbone.state_dict()["conv1.0.weight"].equal(net.state_dict()["conv1.0.weight"])
