"""Average precision of detections: which of them find an object, by COCO's rule and VOC's, and the curve they make.

COCO: Lin et al., ECCV 2014, and its public evaluation. VOC: Everingham et al., IJCV 2010, Section 4.2. What is kept of
an image is small, so that average precision on resampled images costs a pass over the detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["coco", "voc"]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps from which on a detection can find an object."""
RECALLS = {"coco": np.linspace(0, 1, 101), "voc": np.arange(0.0, 1.1, 0.1)}
"""Recalls at which precision is read: COCO's 101, VOC 2007's 11."""
AT_MOST = 100
"""Detections of one class in one image that COCO looks at."""
FOUND, WRONG, LEFT_OUT = 1, 0, -1


@dataclass(frozen=True)
class Detections:
    """What a detector says of one image."""

    boxes: Tensor
    """[d, 4] float32, left, top, right, bottom in pixels."""
    scores: Tensor
    """[d]."""
    labels: Tensor
    """[d] int64."""
    masks: Tensor | None = None
    """[d, H, W] bool."""


@dataclass(frozen=True)
class Truth:
    """The objects of one image, as in Scene."""

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class ImageMatches:
    """One image's detections, by falling score, and what became of them."""

    scores: np.ndarray
    """[d] float64."""
    labels: np.ndarray
    """[d] int64."""
    outcomes: np.ndarray
    """[T, d] int8 at each of THRESHOLDS: FOUND an object, WRONG, or LEFT_OUT, having found an ignored one."""
    objects: np.ndarray
    """[C] int64: objects of each class that count."""


def match_image(truth: Truth, found: Detections, *, classes: int, rule: Rule, masks: bool = False) -> ImageMatches:
    """Match one image's detections with its objects, class by class, the highest score first.

    coco: a detection takes the object of greatest overlap that none took before; an ignored object is taken only where
    no other can be, by any number of detections, and its overlap is the share of the detection that it covers.
    voc: a detection looks at the object of greatest overlap alone, and is wrong where that is taken. Overlaps are of
    masks instead of boxes with `masks`. Equal scores keep their order.
    """
    order = np.argsort(-found.scores.double().numpy(), kind="stable")
    scores, labels = found.scores.double().numpy()[order], found.labels.numpy()[order]
    outcomes = np.zeros((len(THRESHOLDS), len(order)), dtype=np.int8)
    looked_at = np.ones(len(order), dtype=bool)
    of_object, ignored = truth.labels.numpy(), truth.ignored.numpy()
    for label in np.unique(labels):
        rows, columns = np.flatnonzero(labels == label), np.flatnonzero(of_object == label)
        if rule == "coco":
            looked_at[rows[AT_MOST:]] = False
            rows = rows[:AT_MOST]
        overlap = _overlaps(truth, found, order[rows], columns, crowds=rule == "coco", masks=masks)  # [d, g]
        matched = _coco if rule == "coco" else _voc
        outcomes[:, rows] = matched(overlap, ignored[columns])
    objects = np.bincount(of_object[~ignored], minlength=classes)
    return ImageMatches(scores[looked_at], labels[looked_at], outcomes[:, looked_at], objects)


class Matches:
    """The matches of a set of images, ready for average precision on any resample of them."""

    def __init__(self, images: Sequence[ImageMatches], *, rule: Rule):
        self.images = len(images)
        self.recalls = RECALLS[rule]
        self.objects = np.stack([image.objects for image in images])  # [M, C]
        of_image = np.repeat(np.arange(len(images)), [len(image.scores) for image in images])
        scores = np.concatenate([image.scores for image in images])
        labels = np.concatenate([image.labels for image in images])
        outcomes = np.concatenate([image.outcomes for image in images], axis=1)
        self._by_class: list[tuple[np.ndarray, np.ndarray]] = []  # images [n] and outcomes [T, n] by falling score
        for label in range(self.objects.shape[1]):
            own = np.flatnonzero(labels == label)
            own = own[np.argsort(-scores[own], kind="stable")]
            self._by_class.append((of_image[own], outcomes[:, own]))

    def average_precision(
        self, index: Tensor | None = None, thresholds: slice | Sequence[int] = slice(None)
    ) -> np.ndarray:
        """[T, C], in percent: the mean over the recalls of the best precision at that recall or above.

        index: [M] positions of images, some repeatedly; none: all, once. thresholds: which of THRESHOLDS. NaN for
        classes of which no object counts. An image that occurs k times counts k times.
        """
        whole = np.ones(self.images) if index is None else np.bincount(index.numpy(), minlength=self.images)
        times = whole.astype(np.float64)
        objects = times @ self.objects  # [C]
        values = np.full((len(THRESHOLDS[thresholds]), len(objects)), np.nan)
        for label, (of_image, outcomes) in enumerate(self._by_class):
            if objects[label] > 0:
                values[:, label] = self._of_class(times[of_image], outcomes[thresholds], objects[label])
        return 100 * values

    def mean(self, index: Tensor | None = None, thresholds: slice | Sequence[int] = slice(None)) -> float:
        """Mean over thresholds and over the classes that have objects, in percent; NaN where none has.

        A class of which a resample has no object keeps its average precision on all images: to leave it out would
        favour resamples without rare classes.
        """
        values = self.average_precision(index, thresholds)
        if index is not None and np.isnan(values).any():
            values = np.where(np.isnan(values), self._whole[thresholds], values)
        return float("nan") if np.isnan(values).all() else float(np.nanmean(values))

    @cached_property
    def _whole(self) -> np.ndarray:
        return self.average_precision()

    def _of_class(self, times: np.ndarray, outcomes: np.ndarray, objects: float) -> np.ndarray:
        right = np.cumsum((outcomes == FOUND) * times, axis=1)  # [T, n]
        wrong = np.cumsum((outcomes == WRONG) * times, axis=1)
        precision = right / np.maximum(right + wrong, np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        values = np.zeros(len(outcomes))
        for row, (recall, of_recall) in enumerate(zip(right / objects, best, strict=True)):
            reached = np.searchsorted(recall, self.recalls, side="left")
            values[row] = of_recall[reached[reached < len(recall)]].sum() / len(self.recalls)
        return values


def _coco(overlap: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """[T, d] outcomes of detections by falling score from overlaps [d, g]."""
    outcomes = np.zeros((len(THRESHOLDS), len(overlap)), dtype=np.int8)
    if not overlap.shape[1]:
        return outcomes
    taken = np.zeros((len(THRESHOLDS), overlap.shape[1]), dtype=bool)
    rows = np.arange(len(THRESHOLDS))
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    for number, own in enumerate(overlap):
        possible = own >= least
        counting = np.where(possible & ~ignored & ~taken, own, -1.0)  # [T, g]
        best = counting.shape[1] - 1 - counting[:, ::-1].argmax(1)  # of equal ones the last, as COCO does
        hit = counting[rows, best] >= 0
        taken[rows[hit], best[hit]] = True
        outcomes[hit, number] = FOUND
        outcomes[~hit & (possible & ignored).any(1), number] = LEFT_OUT
    return outcomes


def _voc(overlap: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """[T, d] outcomes of detections by falling score from overlaps [d, g]."""
    outcomes = np.zeros((len(THRESHOLDS), len(overlap)), dtype=np.int8)
    if not overlap.shape[1]:
        return outcomes
    taken = np.zeros((len(THRESHOLDS), overlap.shape[1]), dtype=bool)
    for number, own in enumerate(overlap):
        best = int(own.argmax())
        near = own[best] > THRESHOLDS
        if ignored[best]:
            outcomes[near, number] = LEFT_OUT
        else:
            outcomes[near & ~taken[:, best], number] = FOUND
            taken[near, best] = True
    return outcomes


def _overlaps(
    truth: Truth, found: Detections, rows: np.ndarray, columns: np.ndarray, *, crowds: bool, masks: bool
) -> np.ndarray:
    """[d, g] float64, intersection over union, or with `crowds` over the detection for ignored objects."""
    if masks:
        assert truth.masks is not None
        assert found.masks is not None
        first = found.masks[torch.from_numpy(rows)].flatten(1).float()
        second = truth.masks[torch.from_numpy(columns)].flatten(1).float()
        common = (first @ second.T).double().numpy()  # whole numbers below 2^24: exact in float32
        sizes, others = first.sum(1).double().numpy(), second.sum(1).double().numpy()
    else:
        a, b = found.boxes.double().numpy()[rows][:, None], truth.boxes.double().numpy()[columns][None]
        sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
        common = sides.clip(min=0).prod(-1)
        sizes, others = (a[..., 2:] - a[..., :2]).prod(-1)[:, 0], (b[..., 2:] - b[..., :2]).prod(-1)[0]
    union = sizes[:, None] + others - common
    if crowds:
        union = np.where(truth.ignored.numpy()[columns], sizes[:, None], union)
    return common / np.maximum(union, np.spacing(1))
