"""How good frozen features are: the evaluations by name, each a function of a training and a test split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Modules, not their functions: `mvmr.evaluation.knn` stays the module of that name.
from mvmr.evaluation import knn, linear
from mvmr.types import Section

__all__ = ["EVALUATIONS", "Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """One kind of evaluation."""

    config: type[Section]
    """Its settings."""
    function: Callable[[Any, Any, Any], dict[str, float]]
    """function(train, test, config) -> metrics, accuracies in percent."""
    description: str
    """One line for lists."""


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
}
