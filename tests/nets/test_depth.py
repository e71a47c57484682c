from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from mvmr.errors import UserError
from mvmr.nets.depth import layer_depths, layer_scales
from mvmr.nets.encoders import EncoderConfig, build_encoder

DEPTH = 3


def vit(name: str = "vit_tiny_patch16_224", **settings: object) -> nn.Module:
    return timm.create_model(name, num_classes=0, img_size=32, depth=DEPTH, **settings)


def test_a_vit_counts_from_its_patches_to_its_norm() -> None:
    depths, count = layer_depths(vit())
    assert count == DEPTH + 2
    at_zero = {name for name, depth in depths.items() if depth == 0}
    assert at_zero == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for block in range(DEPTH):
        inside = {depth for name, depth in depths.items() if name.startswith(f"blocks.{block}.")}
        assert inside == {block + 1}
    assert depths["norm.weight"] == depths["norm.bias"] == DEPTH + 1
    assert depths.keys() == dict(vit().named_parameters()).keys()


@pytest.mark.parametrize(
    ("name", "early", "late"),
    [
        ("deit_tiny_distilled_patch16_224", "dist_token", "norm.weight"),
        ("vit_small_patch14_reg4_dinov2", "reg_token", "norm.weight"),
        ("vit_base_patch16_clip_224", "norm_pre.weight", "norm.weight"),
        ("beit_base_patch16_224", "cls_token", "fc_norm.weight"),
    ],
)
def test_tokens_and_norms_of_other_vits(name: str, early: str, late: str) -> None:
    # On no device: only the names matter.
    with torch.device("meta"):
        depths, count = layer_depths(timm.create_model(name, num_classes=0, depth=DEPTH))
    assert (depths[early], depths[late], count) == (0, DEPTH + 1, DEPTH + 2)


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_a_resnet_counts_its_residual_blocks(name: str, blocks: int) -> None:
    depths, count = layer_depths(build_encoder(EncoderConfig(name=name, width=0.125))[0])
    assert count == blocks + 1
    assert depths["conv1.weight"] == depths["bn1.bias"] == 0
    assert depths["layer1.0.conv1.weight"] == depths["layer1.0.bn2.bias"] == 1
    assert depths["layer2.0.downsample.0.weight"] == depths["layer2.0.conv1.weight"] > depths["layer1.1.bn1.weight"]
    assert max(depths.values()) == depths["layer4.1.conv1.weight"] + (name == "resnet50")
    theirs, same = layer_depths(torchvision.models.get_model(name, weights=None))
    assert same == count
    assert {key: theirs[key] for key in depths} == depths
    assert theirs["fc.weight"] == count - 1


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("convnext_atto", "stem.0.weight", "head.norm.weight"),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj.weight", "norm.weight"),
        ("xcit_nano_12_p16_224", "cls_token", "norm.weight"),
        ("mobilenetv3_small_050", "conv_stem.weight", "conv_head.weight"),
    ],
)
def test_other_models_are_grouped_as_timm_says(name: str, first: str, last: str) -> None:
    net = timm.create_model(name, num_classes=0)
    depths, count = layer_depths(net)
    assert depths.keys() == dict(net.named_parameters()).keys()
    assert depths[first] == 0
    assert depths[last] == count - 1 == max(depths.values())
    assert set(depths.values()) == set(range(count)), "no depth is empty"


def test_scales_are_those_of_beit_and_mae() -> None:
    scales = layer_scales(vit(), 0.5)
    assert scales["norm.weight"] == 1.0
    assert scales[f"blocks.{DEPTH - 1}.attn.qkv.weight"] == 0.5
    assert scales["blocks.0.attn.qkv.weight"] == 0.5**DEPTH
    assert scales["patch_embed.proj.weight"] == scales["pos_embed"] == 0.5 ** (DEPTH + 1)
    assert set(layer_scales(vit(), 1.0).values()) == {1.0}


def test_a_compiled_network_has_the_same_depths() -> None:
    net = vit()
    plain, count = layer_depths(net)
    wrapped = torch.compile(net, backend="eager")
    depths, same = layer_depths(wrapped)
    assert same == count
    assert depths == {f"_orig_mod.{name}": depth for name, depth in plain.items()}
    inner = vit()
    inner.blocks[1] = torch.compile(inner.blocks[1], backend="eager")
    depths, _ = layer_depths(inner)
    assert depths["blocks.1._orig_mod.norm1.weight"] == 2
    assert layer_scales(wrapped, 0.5).keys() == dict(wrapped.named_parameters()).keys()


def test_a_network_without_known_order_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.layer_decay.*Sequential.*null"):
        layer_depths(nn.Sequential(nn.Linear(2, 2)))
