"""Detectors: anchors that follow the strides, parts that are the backbone's own, and torchvision's losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvmr.nets.cards import EncoderCard
from mvmr.nets.detector_config import DetectorConfig
from mvmr.nets.detectors import build_detector
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.types import UserError

SMALL = {"min_size": 64, "max_size": 96, "pyramid_width": 16, "hidden": 32, "proposals": 30, "anchors_per_image": 32,
         "regions_per_image": 16, "mask_layers": (8,)}  # fmt: skip
C4 = {**{key: value for key, value in SMALL.items() if key not in ("pyramid_width", "hidden")}, "head": "c4"}


def parts(stem: str = "cifar", name: str = "resnet18") -> tuple[nn.Module, EncoderCard]:
    config = (
        EncoderConfig(name=name, stem=stem, width=0.0625) if name.startswith("resnet") else EncoderConfig(name=name)
    )
    backbone, dim = build_encoder(config)
    card = EncoderCard(encoder=config, dim=dim, image_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), method="mvmr",
                       data="digits", version="0")  # fmt: skip
    return backbone, card


def scene(width: int = 80) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    masks = torch.zeros(1, 64, width, dtype=torch.uint8)
    masks[:, 10:40, 5:30] = 1
    target = {"boxes": torch.tensor([[5.0, 10, 30, 40]]), "labels": torch.tensor([2]), "masks": masks}
    return [torch.rand(3, 64, width)], [target]


def anchor_sides(detector: nn.Module) -> list[list[int]]:
    """Side of the square anchors, of each level."""
    return [sorted({int(side) for side in sizes}) for sizes in detector.rpn.anchor_generator.sizes]


@pytest.mark.parametrize(("stem", "scale"), [("imagenet", 4), ("mvmr", 2), ("cifar", 1)])
def test_anchors_follow_the_strides(stem: str, scale: int) -> None:
    """32 to 512 where the strides are 4 to 64, and in proportion elsewhere."""
    pyramid = build_detector(*parts(stem), DetectorConfig(**SMALL), classes=3)
    assert anchor_sides(pyramid) == [[8 * scale], [16 * scale], [32 * scale], [64 * scale], [128 * scale]]
    c4 = build_detector(*parts(stem), DetectorConfig(**C4), classes=3)
    assert anchor_sides(c4) == [[8 * scale, 16 * scale, 32 * scale, 64 * scale, 128 * scale]]
    images, targets = pyramid.transform(*scene())
    maps = pyramid.backbone(images.tensors)
    assert [images.tensors.shape[-1] // each.shape[-1] for each in maps.values()] == [scale * 2**n for n in range(5)]
    assert [images.tensors.shape[-1] % each.shape[-1] for each in maps.values()] == [0] * 5
    assert len(targets) == 1


@pytest.mark.parametrize(("head", "masks"), [("c4", False), ("fpn", False), ("fpn", True)])
def test_every_parameter_is_trained(head: str, masks: bool) -> None:
    torch.manual_seed(0)
    backbone, card = parts()
    detector = build_detector(backbone, card, DetectorConfig(**(C4 if head == "c4" else SMALL)), classes=3, masks=masks)
    losses = detector(*scene())
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} | (
        {"loss_mask"} if masks else set()
    )
    assert losses.keys() == names
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []
    assert {id(p) for p in backbone.parameters()} <= {id(p) for p in detector.parameters()}
    detector.eval()
    (found,) = detector(scene()[0])
    assert found["boxes"].shape[1] == 4
    assert ("masks" in found) == masks


def test_it_normalises_by_the_card_and_has_batch_norm_in_new_layers() -> None:
    pyramid = build_detector(*parts(), DetectorConfig(**SMALL), classes=3)
    assert (pyramid.transform.image_mean, pyramid.transform.image_std) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert sum(isinstance(part, nn.BatchNorm2d) for part in pyramid.backbone.pyramid.modules()) == 8
    c4 = build_detector(*parts(), DetectorConfig(**C4), classes=3)
    stage, norm, *_ = c4.roi_heads.box_head
    assert isinstance(norm, nn.BatchNorm2d)
    assert c4.roi_heads.box_roi_pool.output_size == (14, 14)
    regions = torch.rand(5, 16, 14, 14)
    c4.eval()
    torch.testing.assert_close(c4.roi_heads.box_head(regions), norm(stage(regions)).mean((2, 3)))
    assert c4.roi_heads.box_predictor.cls_score.out_features == 4
    levels = build_detector(*parts(), DetectorConfig(**{**SMALL, "levels": (2, 4)}), classes=3)
    assert anchor_sides(levels) == [[16], [64], [128]]


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="head=c4 has no masks"):
        build_detector(*parts(), DetectorConfig(**C4), classes=3, masks=True)
    with pytest.raises(UserError, match=r"levels=\[3, 2\]"):
        build_detector(*parts(), DetectorConfig(**{**SMALL, "levels": (3, 2)}), classes=3)
    backbone, card = parts(name="timm:convnext_atto")
    with pytest.raises(UserError, match="head=c4 needs a ResNet"):
        build_detector(backbone, card, DetectorConfig(**C4), classes=3)
    assert len(build_detector(backbone, card, DetectorConfig(**SMALL), classes=3)(*scene())) == 4
    with pytest.raises(UserError, match="not vision transformers"):
        build_detector(timm_vit(), card, DetectorConfig(**SMALL), classes=3)


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("test_vit", num_classes=0)
