"""How good frozen features are: the evaluations by name, each a function of a training and a test split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Modules, not their functions: `mvmr.evaluation.knn` stays the module of that name.
from mvmr.evaluation import (
    clusters,
    detection,
    diagnostics,
    finetune,
    head,
    instance,
    knn,
    linear,
    linear_images,
    linear_presets,
    logistic,
    multilabel,
    retrieval,
    robustness,
    semantic,
    zero_shot,
)
from mvmr.evaluation.workplace import Workplace
from mvmr.types import Section

__all__ = ["EVALUATIONS", "Evaluation", "Workplace"]

On = Literal["features", "images", "scenes"]


def _train_and_test(config: Section) -> tuple[str, str]:
    return "train", "test"


def _test_alone(config: Section) -> tuple[str, str]:
    return "test", "test"


@dataclass(frozen=True)
class Evaluation:
    """One kind of evaluation."""

    config: type[Section]
    """Its settings."""
    function: Callable[..., dict[str, float]]
    """on features: function(train, test, config) of two Features; on images: function(encoder, train, test, config,
    workplace) of two ImageSources; on scenes: function(encoder, data, config, workplace) of a DataConfig. Returns
    metrics, accuracies in percent. The encoder that it is given stays as it is: what is trained is a copy."""
    description: str
    """One line for lists."""
    on: On | Callable[[Any], On] = "features"
    """What it is given: frozen features, the encoder and the images, or the encoder and where scenes with boxes, masks
    or label maps lie; a function says it from the settings."""

    splits: Callable[[Any], tuple[str, str]] = _train_and_test
    """On features and images: the splits that it is given as train and test, from the settings."""
    fingerprints: Callable[[Any, Any], Mapping[str, str]] | None = None
    """On scenes: function(data, config), a hash of everything that each split holds, annotations included."""

    def given(self, config: Section) -> On:
        """What it is given under these settings."""
        return self.on(config) if callable(self.on) else self.on


EVALUATIONS: dict[str, Evaluation] = {
    "knn": Evaluation(knn.KNNConfig, knn.knn, "weighted nearest neighbours by cosine similarity; nothing is trained"),
    "linear": Evaluation(
        linear_presets.LinearPresetConfig,
        linear_images.linear_by_preset,
        "linear layer by MV-MR's protocol on frozen features, or by another's on augmented images (linear.preset)",
        on=linear_presets.works_on,
    ),
    "linear_fast": Evaluation(
        linear.LinearFastConfig,
        linear.linear_fast,
        "logistic regression on standardised features, solved to its optimum",
    ),
    "logistic": Evaluation(
        logistic.LogisticConfig, logistic.logistic, "logistic regression on n labels a class, drawn several times"
    ),
    "retrieval": Evaluation(
        retrieval.RetrievalConfig,
        retrieval.retrieval,
        "ranking by cosine similarity: mAP, mAP@K and recall@K; nothing is trained",
        splits=retrieval.splits,
    ),
    "clustering": Evaluation(
        clusters.ClusteringConfig,
        clusters.clustering,
        "k-means without labels, against the classes: accuracy, NMI, AMI, ARI",
        splits=clusters.splits,
    ),
    "multilabel": Evaluation(
        multilabel.MultilabelConfig,
        multilabel.multilabel,
        "a logistic regression or SVM for each of several classes an image, by mean average precision",
    ),
    "finetune": Evaluation(
        finetune.FinetuneConfig,
        finetune.finetune,
        "encoder and linear head trained together on few labels or all; the encoder given stays as it is",
        on="images",
    ),
    "head": Evaluation(
        head.HeadConfig,
        head.head,
        "the linear head saved beside the encoder; nothing is trained",
        splits=_test_alone,
    ),
    "robustness": Evaluation(
        robustness.RobustnessConfig,
        robustness.robustness,
        "linear_fast's classifier on test images under noise, blur, brightness and JPEG",
        on="images",
    ),
    "diagnostics": Evaluation(
        diagnostics.DiagnosticsConfig,
        diagnostics.diagnostics,
        "rank, spectrum, LiDAR, uniformity and dependence of features; no label is read",
        on="images",
        splits=diagnostics.splits,
    ),
    "detection": Evaluation(
        detection.DetectionConfig,
        detection.detection,
        "a Faster R-CNN on the encoder, trained on boxes: average precision",
        on="scenes",
        fingerprints=detection.fingerprints,
    ),
    "instance": Evaluation(
        instance.InstanceConfig,
        instance.instance,
        "a Mask R-CNN on the encoder, trained on boxes and masks of COCO: average precision of both",
        on="scenes",
        fingerprints=instance.fingerprints,
    ),
    "semantic": Evaluation(
        semantic.SemanticConfig,
        semantic.semantic,
        "semantic segmentation: an FCN head and the encoder trained on label maps, by mean IoU",
        on="scenes",
        fingerprints=semantic.fingerprints,
    ),
    "zero_shot": Evaluation(
        zero_shot.ZeroShotConfig,
        zero_shot.zero_shot,
        "CLIP-like encoders: the class name whose sentence is nearest to the image; nothing is trained",
        on="images",
    ),
}
