"""The few types that every layer shares: settings, batches, steps, features, results and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mvmr.errors import RunError, UserError

__all__ = ["Batch", "FeaturePass", "Features", "Result", "RunError", "Section", "Step", "UserError"]


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel mean and deviation of ImageNet's images in [0, 1], which most published networks expect."""


class Section(BaseModel):
    """One section of the settings: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Batch:
    """What a method sees: the views of B images and the fixed representations of their plain versions."""

    index: Tensor
    """[B] int64, positions in the data set."""
    views: dict[str, Tensor]
    """{stream: [V, B, C, H, W]}, normalised; "plain" (V = 1) is the image without augmentation."""
    representations: dict[str, Tensor] = field(default_factory=dict)
    """{name: [B, F]}, without gradient."""


@dataclass(frozen=True)
class Step:
    """Where a run is, counted in optimiser steps; every schedule is a pure function of it."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """In [0, 1]: 0 at the first step, 1 at the last."""
        return min(1.0, self.step / max(1, self.total_steps - 1))

    @property
    def starts_epoch(self) -> bool:
        return self.step % self.steps_per_epoch == 0


@dataclass(frozen=True)
class Features:
    """Frozen features of one split of a data set."""

    x: Tensor
    """[N, D] float32."""
    y: Tensor | None = None
    """[N] int64; [N, C] int8 of 1, 0 and -1 (to be ignored) where images have several; or None."""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One evaluation of one encoder on one data set, as written to results/EVALUATION-DATA.json."""

    evaluation: str
    data: str
    split: str
    metrics: dict[str, float]
    """By name; NAME_low and NAME_high are the ends of NAME's 95 % confidence interval."""
    settings: dict[str, Any]
    encoder: str
    seconds: float
    fingerprint: str = ""
    """Of the encoder, the images and the settings: equal where the same evaluation would be made again."""
    outcomes: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """{metric: [M]}, what each test image contributed, in the order of the split, but for images that the evaluation
    leaves out by their labels; kept beside the JSON, not in it."""
    statistics: Mapping[str, Callable[[Tensor], float]] = field(default_factory=dict, compare=False, repr=False)
    """{metric: function of positions of test images}, for metrics that are no mean over images; not kept."""
    images: int = 0
    """Test images that the statistics are of."""

    def as_json(self) -> dict[str, Any]:
        """What is written."""
        return {key: value for key, value in vars(self).items() if key not in ("outcomes", "statistics", "images")}


class FeaturePass(Protocol):
    """A pass over the whole un-augmented data set, of which every rank gets its share. All ranks call it together."""

    def __call__(self, fn: Callable[[Tensor], Tensor], /) -> tuple[Tensor, Tensor]:
        """This rank's (index [n], features [n, D]) of fn, which is given normalised plain images [b, C, H, W].

        Every rank calls fn equally often, and its k-th calls on all ranks together hold the same images on any number
        of ranks: batch norm in train mode may be synchronised in them.
        """

    def representation(self, name: str, /) -> tuple[Tensor, Tensor]:
        """This rank's (index [n], rows [n, F]) of one of the run's representations, looked up where it is cached."""
