"""Object detection: a Faster R-CNN on the encoder, trained on boxes and measured by average precision.

He, Fan, Wu, Xie, Girshick, "Momentum contrast", CVPR 2020, Section 4.2 and appendix: PASCAL VOC with the C4 head.
"""

from __future__ import annotations

import warnings
from typing import Literal

from pydantic import model_validator

from mvmr.data.images import Progress
from mvmr.data.scenes import SCENES, SceneSource, open_scenes
from mvmr.data.sources import DataConfig
from mvmr.evaluation.box_metrics import DetectionMetrics
from mvmr.evaluation.detector_training import DetectorTraining, detections, trained_detector
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.types import UserError

VOC2007 = ("voc07", "voc0712")
"""Data sets whose test split is VOC 2007's."""
VOC = (*VOC2007, "voc12")


class DetectionConfig(DetectorTraining):
    """Settings of `detection`; the defaults are MoCo's for VOC."""

    head: Literal["c4", "fpn"] = "c4"
    """c4: proposals on the third stage's map, the fourth stage with one more batch norm on each of them; fpn: a feature
    pyramid and two linear layers."""
    train_on_difficult: bool = True
    """Train on the objects that VOC marks as difficult too, as detectron2 does; they never count in the test."""

    @model_validator(mode="after")
    def _without_masks(self) -> DetectionConfig:
        if "mask_layers" in self.model_fields_set:
            warnings.warn("detection.mask_layers: without effect; masks are those of `instance`", stacklevel=2)
        return self


def detection(encoder: Encoder, data: DataConfig, config: DetectionConfig, workplace: Workplace) -> Metrics:
    """{"ap", "ap50", "ap75"} of boxes on the test split, in percent, after the last step; statistics of its images.

    On VOC 2007 also "ap_voc07", "ap50_voc07", "ap75_voc07" by its rule and 11 points. And "loss_first",
    "loss_last" (means over the first and last tenth of the training) and "n_train", the training images. The encoder
    stays as it is; `workplace.out` gets detector.safetensors. Raises UserError and RunError.
    """
    train, test = open_pair(data, config, key="detection", progress=workplace.progress)
    metrics = DetectionMetrics(len(train.classes), voc07=data.name in VOC2007)
    trained = trained_detector(
        encoder, train, config, workplace, key="detection",
        with_ignored=config.train_on_difficult and data.name in VOC,
    )  # fmt: skip
    for scene, found in detections(trained.detector, test, config, workplace):
        metrics.update(scene, found)
    return metrics.compute().also(**trained.summary(), n_train=float(len(train)))


def fingerprints(data: DataConfig, config: DetectionConfig) -> dict[str, str]:
    """Of the scenes that `detection` is of."""
    train, test = open_pair(data, config, key="detection")
    return {"train": train.fingerprint, "test": test.fingerprint}


def open_pair(
    data: DataConfig, config: DetectorTraining, *, key: str, masks: bool = False, progress: Progress | None = None
) -> tuple[SceneSource, SceneSource]:
    """The scenes to train on and to test on, as the settings say. Raises UserError where they do not fit each other."""
    train = open_scenes(data, "train", masks=masks, annotations=config.train_annotations, progress=progress)
    test = open_scenes(data, "test", masks=masks, annotations=config.test_annotations, progress=progress)
    if train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{key}: {train.name} and {test.name} have different classes"
            f"{': ' + ', '.join(other[:5]) if other else ' in order'}; {remedy(data, key)}"
        )
    if all(objects.ignored.all() for objects in test.objects):
        raise UserError(f"{key}: {test.name} has no object that counts; {remedy(data, key)}")
    return (train.as_one_class(), test.as_one_class()) if config.one_class else (train, test)


def remedy(data: DataConfig, key: str) -> str:
    """What to change where a split's annotations do not do."""
    if SCENES[data.name].masks:
        return f"give other files as {key}.train_annotations and {key}.test_annotations"
    return "put the whole archive under data.root"
