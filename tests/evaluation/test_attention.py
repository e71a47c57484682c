"""Attention of the class token against timm's own un-fused path, and the sheets of pictures made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from mvmr.evaluation.attention import GAP, attention_maps, class_attention, keep_mass, write_attention
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.resnet import LAYOUTS, ResNet
from mvmr.types import UserError


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, **settings}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **given)
    with torch.no_grad():  # timm's start gives nearly even attention
        for block in net.blocks:
            block.attn.qkv.weight.mul_(20)
    return net


def weights_of_timm(net: nn.Module, images: Tensor) -> Tensor:
    """[B, heads, tokens, tokens] as timm's un-fused attention makes them in its last block."""
    attention, seen = net.blocks[-1].attn, []
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        net.eval()(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (16, 16)),
        ({"dynamic_img_size": True}, (24, 12)),
        ({"qk_norm": True, "reg_tokens": 2}, (16, 16)),
        ({"drop_path_rate": 0.5, "qkv_bias": False}, (16, 16)),
    ],
)
def test_equals_timms_own_weights(settings: dict[str, Any], size: tuple[int, int]) -> None:
    net, images = vit(**settings).train(), torch.randn(2, 3, *size)
    found = class_attention(net, images)
    assert net.training
    expected = weights_of_timm(net, images)[:, :, 0]
    assert expected.max() > 3 / expected.shape[-1]  # far from even
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    maps = attention_maps(net, images)
    assert maps.shape == (2, 3, size[0] // 4, size[1] // 4)
    prefix = 1 + settings.get("reg_tokens", 0)
    torch.testing.assert_close(maps.flatten(2), expected[..., prefix:], rtol=1e-4, atol=1e-6)


def test_maps_lie_as_the_image_does() -> None:
    """A patch unlike the others is found where it is, row by row."""
    net = vit()
    with torch.no_grad():
        net.pos_embed.zero_()
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 4:8, 12:16] = torch.randn(3, 4, 4) * 3  # row 1, column 3
    maps = attention_maps(net, images)
    others = maps.flatten(2)[..., torch.arange(16) != 7]
    torch.testing.assert_close(others, others[..., :1].expand_as(others))
    assert (maps[..., 1, 3] - others[..., 0]).abs().max() > 1e-3


def test_leaves_no_trace_and_ignores_autocast() -> None:
    net, images = vit().train(), torch.randn(1, 3, 16, 16)
    net.blocks[0].eval()
    exact = class_attention(net, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(class_attention(net, images), exact)
    assert not net.blocks[-1].attn._forward_pre_hooks
    assert [block.training for block in net.blocks] == [False, True, True]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not exact.requires_grad


def test_takes_a_loaded_encoder_with_images_as_they_are() -> None:
    backbone = vit()
    card = EncoderCard(
        encoder=EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=16, patch_size=4), dim=24, image_size=16,
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), method="dino", data="digits", version="0",
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    normalised = (images / 255 - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)
    found = attention_maps(Encoder(backbone, card), images)
    torch.testing.assert_close(found, attention_maps(backbone, normalised))


def test_encoders_without_such_maps_are_refused() -> None:
    images = torch.zeros(1, 3, 16, 16)
    resnet = ResNet(LAYOUTS["resnet18"], stem="cifar", width=0.125, zero_init_residual=True)
    with pytest.raises(UserError, match=r"encoder is a ResNet; take .*timm:vit_"):
        attention_maps(resnet, images)
    with pytest.raises(UserError, match="no class token"):
        attention_maps(vit(class_token=False, global_pool="avg"), images)
    other = vit()
    other.blocks[-1].attn = nn.Identity()
    with pytest.raises(UserError, match="of the kind Identity"):
        attention_maps(other, images)
    net = vit()
    with pytest.raises(UserError, match=r"images of 20 x 20 pixels .*encoder.any_size=true"):
        attention_maps(net, torch.zeros(1, 3, 20, 20))
    assert not net.blocks[-1].attn._forward_pre_hooks


def test_mass_is_kept_by_the_highest_patches() -> None:
    values = torch.tensor([[0.1, 0.4], [0.2, 0.3]])
    assert keep_mass(values, 0.3).tolist() == [[False, True], [False, False]]
    assert keep_mass(values, 0.6).tolist() == [[False, True], [False, True]]
    assert keep_mass(values, 0.75).tolist() == [[False, True], [True, True]]
    assert keep_mass(values, 1.0).all()
    even = torch.full((2, 3, 5, 5), 0.01)
    assert keep_mass(even, 0.6).sum((-2, -1)).tolist() == [[15] * 3] * 2
    maps = torch.rand(2, 3, 6, 7)
    kept = keep_mass(maps, 0.6)
    share = (maps * kept).sum((-2, -1)) / maps.sum((-2, -1))
    least = maps.masked_fill(~kept, 2).amin((-2, -1))
    assert (share >= 0.6).all()
    assert (share - least / maps.sum((-2, -1)) < 0.6).all()  # with one patch less it would not be kept
    assert (least >= maps.masked_fill(kept, -1).amax((-2, -1))).all()
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="mass is"):
            keep_mass(maps, wrong)


def cell(sheet: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    at = side + GAP
    return sheet[row * at : row * at + side, column * at : column * at + side]


def test_sheet_has_a_row_an_image(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    maps = torch.zeros(2, 3, 2, 2)
    maps[:, 0, 0, 1], maps[:, 1, 1, 0] = 0.5, 0.2
    maps[:, 2] = 0.3  # even
    file = write_attention(tmp_path / "new" / "maps.png", images, maps, side=16)
    with Image.open(file) as image:
        assert image.format == "PNG"
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 16 + GAP, 5 * 16 + 4 * GAP, 3)
    doubled = images[1].permute(1, 2, 0).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
    assert (cell(sheet, 1, 0, 16) == doubled).all()
    mean, first, even = (cell(sheet, 0, column, 16).astype(int).sum(-1) for column in (1, 2, 4))
    assert first[4, 12] == 252 + 255 + 164  # the greatest of its map
    assert first[12, 4] == first[4, 4] == 4
    assert mean[4, 12] > mean[12, 4] > mean[4, 4] == 4
    assert (even == 4).all()
    assert (sheet[:, 16 : 16 + GAP] == 255).all()
    floats = write_attention(tmp_path / "floats.png", images.float() / 255, maps, side=16)
    assert floats.read_bytes() == file.read_bytes()


def test_sheet_of_what_is_kept(tmp_path: Path) -> None:
    images = torch.full((1, 3, 12, 8), 200, dtype=torch.uint8)
    maps = torch.tensor([[0.7, 0.1], [0.1, 0.1]]).view(1, 1, 2, 2)
    with Image.open(write_attention(tmp_path / "kept.png", images, maps, mass=0.6, side=8)) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (12, 3 * 8 + 2 * GAP, 3)
    shown = sheet[:, 2 * (8 + GAP) :]
    assert (shown[:6, :4] == 200).all()
    assert (shown[6:] == 30).all()
    assert (shown[:6, 4:] == 30).all()
    with pytest.raises(ValueError, match="are needed"):
        write_attention(tmp_path / "x.png", images, maps[0])
