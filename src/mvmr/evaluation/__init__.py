"""How good frozen features are: the evaluations by name, each a function of a training and a test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Modules, not their functions: `mvmr.evaluation.knn` stays the module of that name.
from mvmr.evaluation import finetune, head, knn, linear, multilabel
from mvmr.evaluation.workplace import Workplace
from mvmr.types import Section

__all__ = ["EVALUATIONS", "Evaluation", "Workplace"]


@dataclass(frozen=True)
class Evaluation:
    """One kind of evaluation."""

    config: type[Section]
    """Its settings."""
    function: Callable[..., dict[str, float]]
    """on features: function(train, test, config) of two Features; on images: function(encoder, train, test, config,
    workplace) of two ImageSources. Returns metrics, accuracies in percent. An image function leaves the encoder as it
    is and trains a copy."""
    description: str
    """One line for lists."""
    on: Literal["features", "images"] = "features"
    """What it is given: frozen features, or the encoder and the images."""


EVALUATIONS: dict[str, Evaluation] = {
    "knn": Evaluation(knn.KNNConfig, knn.knn, "weighted nearest neighbours by cosine similarity; nothing is trained"),
    "linear": Evaluation(
        linear.LinearConfig, linear.linear, "linear layer by MV-MR's protocol: Adam, 100 epochs, last epoch"
    ),
    "linear_fast": Evaluation(
        linear.LinearFastConfig,
        linear.linear_fast,
        "logistic regression on standardised features, solved to its optimum",
    ),
    "multilabel": Evaluation(
        multilabel.MultilabelConfig,
        multilabel.multilabel,
        "a logistic regression for each of several classes an image, by mean average precision",
    ),
    "finetune": Evaluation(
        finetune.FinetuneConfig,
        finetune.finetune,
        "encoder and linear head trained together on few labels or all; the encoder given stays as it is",
        on="images",
    ),
    "head": Evaluation(head.HeadConfig, head.head, "the linear head saved beside the encoder; nothing is trained"),
}
