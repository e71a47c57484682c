"""Object detection: a Faster R-CNN on the encoder, trained on boxes and measured by average precision.

He, Fan, Wu, Xie, Girshick, "Momentum contrast", CVPR 2020, Section 4.2 and appendix: PASCAL VOC with the C4 head.
"""

from __future__ import annotations

from typing import Literal

from mvmr.data.scenes import SceneSource, open_scenes
from mvmr.data.sources import DataConfig
from mvmr.evaluation.box_metrics import DetectionMetrics
from mvmr.evaluation.detector_training import DetectorTraining, detections, trained_detector
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.types import UserError

VOC = ("voc07", "voc0712")


class DetectionConfig(DetectorTraining):
    """Settings of `detection`; the defaults are MoCo's for VOC."""

    head: Literal["c4", "fpn"] = "c4"
    """c4: proposals on the third stage's map, the fourth stage with one more batch norm on each of them; fpn: a feature
    pyramid and two linear layers."""
    train_on_difficult: bool = True
    """Train on the objects that VOC marks as difficult too, as detectron2 does; they never count in the test."""


def detection(encoder: Encoder, data: DataConfig, config: DetectionConfig, workplace: Workplace) -> Metrics:
    """{"ap", "ap50", "ap75"} of boxes on the test split, in percent, after the last step; statistics of its images.

    On VOC also "ap_voc07", "ap50_voc07", "ap75_voc07" by the rule and 11 points of VOC 2007. And "loss_first",
    "loss_last" (means over the first and last tenth of the training) and "n_train", the training images. The encoder
    stays as it is; `workplace.out` gets detector.safetensors. Raises UserError and RunError.
    """
    train = open_scenes(data, "train", annotations=config.train_annotations, progress=workplace.progress)
    test = open_scenes(data, "test", annotations=config.test_annotations, progress=workplace.progress)
    check_pair(train, test, key="detection")
    if config.one_class:
        train, test = train.as_one_class(), test.as_one_class()
    metrics = DetectionMetrics(len(train.classes), voc07=data.name in VOC)
    trained = trained_detector(
        encoder, train, config, workplace, key="detection",
        with_ignored=config.train_on_difficult and data.name in VOC,
    )  # fmt: skip
    for scene, found in detections(trained.detector, test, config, workplace):
        metrics.update(scene, found)
    trained.resumable.finished()
    return metrics.compute().also(**trained.summary(), n_train=float(len(train)))


def check_pair(train: SceneSource, test: SceneSource, *, key: str) -> None:
    """Raises UserError for splits of different classes, and for a test split without objects that count."""
    if train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{key}.train_annotations and test_annotations have different classes"
            f"{': ' + ', '.join(other[:5]) if other else ' in order'}; take files with the same categories"
        )
    if all(objects.ignored.all() for objects in test.objects):
        raise UserError(f"{key}.test_annotations: {test.name} has no object that counts; take other annotations")
