"""Object detectors on a backbone: Faster R-CNN with a feature pyramid or on the third stage (C4), and Mask R-CNN.

Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015; Lin et al., "Feature pyramid networks", CVPR 2017; He, Gkioxari,
Dollár, Girshick, "Mask R-CNN", ICCV 2017. The parts are torchvision's; anchors follow the strides of the backbone.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mvmr.nets.cards import EncoderCard
from mvmr.nets.detector_config import DetectorConfig
from mvmr.nets.feature_maps import FeatureMaps
from mvmr.types import UserError

RATIOS = (0.5, 1.0, 2.0)
"""Height to width of the anchors."""
ANCHOR = 8
"""Side of a pyramid level's anchors in its strides: 32 ... 512 at strides 4 ... 64."""
C4_ANCHORS = (2, 4, 8, 16, 32)
"""Sides of C4's anchors in its stride: 32 ... 512 at stride 16."""


class Pyramid(nn.Module):
    """The feature pyramid on some of a backbone's stages, with one more level by pooling; batch norm in its layers."""

    def __init__(self, maps: FeatureMaps, levels: tuple[int, ...], width: int):
        super().__init__()
        self.maps = maps
        self.levels = levels
        self.out_channels = width
        self.pyramid = FeaturePyramidNetwork(
            [maps.channels[level - 1] for level in levels], width, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = list(self.maps(images).values())
        chosen = {f"stage{level}": maps[level - 1] for level in self.levels}
        return self.pyramid(chosen)


class ThirdStage(nn.Module):
    """The third stage's map alone."""

    def __init__(self, maps: FeatureMaps):
        super().__init__()
        self.maps = maps
        self.out_channels = maps.channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        return list(self.maps(images).values())[-1]


class FourthStage(nn.Sequential):
    """Regions [n, C, 14, 14] -> [n, D]: the fourth stage, a further batch norm (MoCo's appendix), the mean."""

    def __init__(self, stage: nn.Module, width: int):
        super().__init__(stage, nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_detector(
    backbone: nn.Module, card: EncoderCard, config: DetectorConfig, *, classes: int, masks: bool = False
) -> FasterRCNN:
    """The detector whose parts are those of `backbone` and otherwise new, drawn by torch's generator; in train mode.

    classes: without the background, which becomes class 0 of what it takes and gives. Its forward is torchvision's:
    float images in [0, 1] of any size, which it normalises by the card. Raises UserError for a backbone or settings
    that do not fit.
    """
    if config.head == "c4":
        return _c4(backbone, card, config, classes, masks)
    maps = FeatureMaps(backbone)
    if any(not 1 <= level <= len(maps.strides) for level in config.levels) or config.levels != tuple(
        sorted(set(config.levels))
    ):
        raise UserError(
            f"levels={list(config.levels)}: stages in rising order from 1 to {len(maps.strides)} are wanted"
        )
    body = Pyramid(maps, config.levels, config.pyramid_width)
    strides = [maps.strides[level - 1] for level in config.levels]
    strides.append(2 * strides[-1])
    names = [f"stage{level}" for level in config.levels]
    anchors = AnchorGenerator(tuple((ANCHOR * stride,) for stride in strides), (RATIOS,) * len(strides))
    common = {
        **_common(card, config, divisible=strides[-1]),
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(config.pyramid_width, len(RATIOS)),
        "rpn_pre_nms_top_n_train": 2 * config.proposals,
        "rpn_pre_nms_top_n_test": config.proposals,
        "rpn_post_nms_top_n_train": config.proposals,
        "rpn_post_nms_top_n_test": config.proposals,
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(config.pyramid_width * 7**2, config.hidden),
        "box_predictor": FastRCNNPredictor(config.hidden, classes + 1),
    }
    if not masks:
        return FasterRCNN(body, **common)
    last = config.mask_layers[-1] if config.mask_layers else config.pyramid_width
    return MaskRCNN(
        body, **common,
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(config.pyramid_width, config.mask_layers, 1),
        mask_predictor=MaskRCNNPredictor(last, last, classes + 1),
    )  # fmt: skip


def _c4(backbone: nn.Module, card: EncoderCard, config: DetectorConfig, classes: int, masks: bool) -> FasterRCNN:
    if masks:
        raise UserError("head=c4 has no masks; take head=fpn")
    maps = FeatureMaps(backbone, stages=3)
    if not maps.rest:
        raise UserError("head=c4 needs a ResNet, whose fourth stage becomes the head; take head=fpn")
    stage, width = maps.rest[0], FeatureMaps(backbone).channels[-1]
    stride = maps.strides[-1]
    anchors = AnchorGenerator((tuple(side * stride for side in C4_ANCHORS),), (RATIOS,))
    return FasterRCNN(
        ThirdStage(maps), **_common(card, config, divisible=stride),
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(maps.channels[-1], len(C4_ANCHORS) * len(RATIOS)),
        rpn_pre_nms_top_n_train=12 * config.proposals, rpn_pre_nms_top_n_test=6 * config.proposals,
        rpn_post_nms_top_n_train=2 * config.proposals, rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=FourthStage(stage, width),
        box_predictor=FastRCNNPredictor(width, classes + 1),
    )  # fmt: skip


def _common(card: EncoderCard, config: DetectorConfig, *, divisible: int) -> dict:
    """What all kinds are given; sides of batches are padded to multiples of `divisible`, so that strides are exact."""
    return {
        "min_size": config.min_size,
        "max_size": config.max_size,
        "image_mean": list(card.mean),
        "image_std": list(card.std),
        "size_divisible": divisible,
        "rpn_batch_size_per_image": config.anchors_per_image,
        "box_batch_size_per_image": config.regions_per_image,
        "box_score_thresh": config.score_threshold,
        "box_detections_per_img": config.detections_per_image,
    }
