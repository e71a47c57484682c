"""Which features a linear layer on images is given: a transformer's last blocks, or an encoder's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.short_probing import CPU, few, tiny
from mvmr.evaluation import Workplace
from mvmr.evaluation.linear_images import frozen, linear_images
from mvmr.evaluation.linear_presets import LinearPresetConfig
from mvmr.nets.weights import Encoder
from mvmr.types import UserError


def by_hand(net: Any, images: Tensor, blocks: int, patches: bool) -> Tensor:
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, given, out: outputs.append(out)) for b in net.blocks]
    net(images)
    for handle in handles:
        handle.remove()
    parts = [net.norm(out)[:, 0] for out in outputs[-blocks:]]
    if patches:
        parts.append(net.norm(outputs[-1])[:, net.num_prefix_tokens :].mean(1))
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("settings", "blocks", "patches"),
    [({}, 4, False), ({"blocks": 2}, 2, False), ({"blocks": 1, "patches": True}, 1, True)],
)
@torch.no_grad()
def test_class_tokens_of_the_last_blocks(settings: dict[str, Any], blocks: int, patches: bool) -> None:
    encoder = tiny("timm:test_vit", image_size=160, dim=64)
    images = torch.randint(0, 256, (2, 3, 160, 160), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    net = frozen(encoder, LinearPresetConfig.model_validate({"preset": "dino", **settings}))
    expected = by_hand(encoder.backbone, (images / 255 - encoder.mean) / encoder.std, blocks, patches)
    assert net.card.dim == expected.shape[1] == 64 * (blocks + patches)
    torch.testing.assert_close(net(images), expected)


@torch.no_grad()
def test_wide_transformers_give_one_token_and_their_patches() -> None:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(img_size=32, patch_size=16, embed_dim=768, depth=2, num_heads=12, num_classes=0).eval()
    encoder = tiny()
    wide = Encoder(net, encoder.card.model_copy(update={"dim": 768, "image_size": 32})).eval()
    found = frozen(wide, LinearPresetConfig.model_validate({"preset": "dino"}))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(images), by_hand(net, (images - wide.mean) / wide.std, 1, True))
    assert found.card.dim == 1536


def test_other_networks_give_their_output_and_transformers_are_trained_on(tmp_path: Path) -> None:
    settings = {"preset": "dino", "epochs": 1, "batch_size": 10}
    config = LinearPresetConfig.model_validate(settings)
    assert frozen(tiny(), config).card.dim == 32
    vit = tiny("timm:test_vit", image_size=160, dim=64)
    place = Workplace(CPU.device, out=tmp_path)
    assert linear_images(vit, few("train", 20), few(count=10), config, place)["n_train"] == 20
    assert list(tmp_path.iterdir()) == []  # the head is not one of the encoder's output
    with pytest.raises(UserError, match=r"linear\.blocks=7, and the encoder has 6 blocks"):
        frozen(vit, LinearPresetConfig.model_validate({**settings, "blocks": 7}))
    with pytest.raises(UserError, match="this encoder is a ResNet; leave them out"):
        frozen(tiny(), LinearPresetConfig.model_validate({**settings, "patches": True}))
