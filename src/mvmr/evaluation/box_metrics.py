"""What a detector is measured by: COCO's average precisions by its public evaluation, and VOC 2007's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from mvmr.data.scene_source import Scene
from mvmr.evaluation.box_matching import RECALLS, THRESHOLDS, Detections, ImageMatches, Matches, Truth, match_image
from mvmr.evaluation.measured import Metrics
from mvmr.types import UserError

Kind = Literal["box", "mask", "voc07"]

AT: dict[str, slice] = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}
"""Which of THRESHOLDS a metric is the mean over."""
THEIRS = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
"""What torchmetrics calls them."""


class DetectionMetrics:
    """Takes images one by one and keeps what their average precision needs, which is little."""

    def __init__(self, classes: int, *, masks: bool = False, voc07: bool = False):
        """masks: measure masks beside boxes; voc07: also measure by the rule and the 11 points of VOC 2007.

        Raises UserError where faster-coco-eval is missing.
        """
        self.classes = classes
        self.masks = masks
        kinds: dict[Kind, bool] = {"box": True, "mask": masks, "voc07": voc07}
        self._coco = _torchmetrics(masks)
        self._images: dict[Kind, list[ImageMatches]] = {kind: [] for kind, wanted in kinds.items() if wanted}

    def update(self, scene: Scene, found: Detections) -> None:
        """One image and what was found in it, on the CPU."""
        truth = Truth(scene.boxes, scene.labels, scene.ignored, scene.masks)
        for kind, images in self._images.items():
            rule: Literal["coco", "voc"] = "voc" if kind == "voc07" else "coco"
            images.append(match_image(truth, found, classes=self.classes, rule=rule, masks=kind == "mask"))
        said: dict[str, Any] = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
        true: dict[str, Any] = {"boxes": truth.boxes, "labels": truth.labels, "iscrowd": truth.ignored.long()}
        if self.masks:
            said["masks"], true["masks"] = found.masks, truth.masks
        self._coco.update([said], [true])

    def matches(self) -> dict[Kind, Matches]:
        """Of all images so far, in their order, by what is measured."""
        return {
            kind: Matches(images, rule="voc" if kind == "voc07" else "coco") for kind, images in self._images.items()
        }

    def compute(self) -> Metrics:
        """{"ap", "ap50", "ap75"} of boxes, or with masks box_ap ... and mask_ap ...; and ap_voc07 ... if asked for.

        In percent; COCO's by faster-coco-eval, those of VOC 2007 by `Matches`. Each is a statistic of the images: of a
        resample it is the mean over the same classes, of which those without objects there keep their value on all
        images. Raises UserError without objects that count.
        """
        values, numbers = self._coco.compute(), {}
        statistics: dict[str, Callable[[Tensor], float]] = {}
        for kind, own in self.matches().items():
            theirs = {"box": "bbox_", "mask": "segm_"}.get(kind, "") if self.masks else ""
            for name, at in AT.items():
                key = f"{name}_voc07" if kind == "voc07" else f"{kind}_{name}" if self.masks else name
                numbers[key] = own.mean(None, at) if kind == "voc07" else 100 * float(values[theirs + THEIRS[name]])
                statistics[key] = partial(own.mean, thresholds=at)
        if not all(value >= 0 for value in numbers.values()):
            raise UserError("the test split has no object that counts; take other annotations")
        return Metrics(numbers, statistics=statistics, images=len(self._images["box"]))


def _torchmetrics(masks: bool) -> Any:
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        raise UserError("average precision is measured by faster-coco-eval: pip install 'mvmr[detection]'") from None
    from torchmetrics.detection import MeanAveragePrecision

    # Its own defaults are rounded to float32, so that a recall of exactly 0.7 might miss its point.
    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox", iou_thresholds=THRESHOLDS.tolist(),
        rec_thresholds=RECALLS["coco"].tolist(), backend="faster_coco_eval",
    )  # fmt: skip
    metric.warn_on_many_detections = False
    return metric
