"""Instance segmentation: a Mask R-CNN on the encoder, trained on boxes and masks of COCO.

He, Gkioxari, Dollár, Girshick, "Mask R-CNN", ICCV 2017, with the feature pyramid, trained as MoCo does (He et al.,
CVPR 2020, Section 4.2): batch norm is trained on, and is in the pyramid too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mvmr.data.sources import DataConfig
from mvmr.evaluation.box_metrics import DetectionMetrics
from mvmr.evaluation.detection import open_pair
from mvmr.evaluation.detector_training import DetectorTraining, Drops, Sizes, detections, trained_detector
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder


class InstanceConfig(DetectorTraining):
    """Settings of `instance`; the defaults are detectron2's 1x schedule for COCO."""

    head: Literal["fpn"] = "fpn"
    """Masks are there with the pyramid only."""
    iterations: int = Field(90_000, ge=1)
    """Steps."""
    warmup: int = Field(1000, ge=0)
    """Steps in which the rate rises from a thousandth of its peak."""
    drops: Drops = (2 / 3, 8 / 9)
    """After these shares of the iterations the rate is divided by ten."""
    train_sizes: Sizes = Field(tuple(range(640, 801, 32)), min_length=1)
    """Shorter sides that training images are brought to, one of these at random for each."""


def instance(encoder: Encoder, data: DataConfig, config: InstanceConfig, workplace: Workplace) -> Metrics:
    """{"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"} on the test split, in percent.

    After the last step; statistics of the test images. And "loss_first", "loss_last" and "n_train" as in `detection`.
    The encoder stays as it is; `workplace.out` gets detector.safetensors. Raises UserError and RunError.
    """
    train, test = open_pair(data, config, key="instance", masks=True, progress=workplace.progress)
    metrics = DetectionMetrics(len(train.classes), masks=True)
    trained = trained_detector(encoder, train, config, workplace, key="instance", masks=True)
    for scene, found in detections(trained.detector, test, config, workplace):
        metrics.update(scene, found)
    return metrics.compute().also(**trained.summary(), n_train=float(len(train)))


def fingerprints(data: DataConfig, config: InstanceConfig) -> dict[str, str]:
    """Of the scenes that `instance` is of."""
    train, test = open_pair(data, config, key="instance", masks=True)
    return {"train": train.fingerprint, "test": test.fingerprint}
