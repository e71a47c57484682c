"""How label maps are confused with the true ones, image by image, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.evaluation.intervals import statistic_interval
from mvmr.evaluation.measured import Metrics
from mvmr.types import UserError

RESAMPLES = 2000


def confusion(predicted: Tensor, labels: Tensor, classes: int, *, ignored: int = 255) -> Tensor:
    """[classes, classes] int64: pixels by true class (rows) and predicted class; labels equal to `ignored` left out.

    predicted and labels: integers of one shape, below `classes`.
    """
    known = labels != ignored
    pairs = labels[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_ious(matrix: Tensor) -> Tensor:
    """Intersection over union [C] float64 in percent, of a confusion matrix [C, C]; NaN for classes that are nowhere.

    A class that is only in the truth, or only predicted, has 0 (Everingham et al., VOC, Section 4.4, for each class).
    """
    return _ious(*_counts(matrix))


def mean_iou(matrix: Tensor) -> float:
    """Mean IoU in percent over the classes that are in the truth or predicted, as torchmetrics' macro Jaccard index."""
    return float(class_ious(matrix).nanmean())


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of the pixels that have their class, in percent."""
    hit, true, _ = _counts(matrix)
    return float(100.0 * hit.sum() / true.sum())


def segmentation_metrics(matrices: Tensor, classes: tuple[str, ...]) -> Metrics:
    """miou, pixel_accuracy and iou/CLASS of the confusion matrices [M, C, C] of M images, in percent.

    miou_low and miou_high are its 95 % interval by bootstrap over images: each resample's matrices are added before
    its IoUs are taken. A class that a resample lacks keeps its IoU on all images there: to leave it out would favour
    resamples without rare classes. One image leaves the interval out. Raises UserError where no pixel has a label.
    """
    total = matrices.sum(0)
    if int(total.sum()) == 0:
        raise UserError("no pixel of the test split has a label; look at its label maps")
    # [3, M, C]: a resample needs no more. Image by image, as all matrices in float64 would be large.
    parts = torch.stack([torch.stack(_counts(matrix)) for matrix in matrices], dim=1)
    whole = class_ious(total)

    def resampled(index: Tensor) -> Tensor:
        times = torch.bincount(index, minlength=parts.shape[1]).double()  # [M]
        return torch.einsum("m,kmc->kc", times, parts)

    def miou(index: Tensor) -> float:
        ious = _ious(*resampled(index))
        return float(torch.where(ious.isnan(), whole, ious).nanmean())

    def accuracy(index: Tensor) -> float:
        hit, true, _ = resampled(index).sum(-1).tolist()
        return 100.0 * hit / true if true else 0.0

    values = {"miou": mean_iou(total), "pixel_accuracy": pixel_accuracy(total)}
    if len(matrices) > 1:
        values |= statistic_interval(miou, len(matrices), kind="centred", resamples=RESAMPLES).named("miou")
    ious = zip(classes, whole.tolist(), strict=True)
    values |= {f"iou/{name}": value for name, value in ious if value == value}
    return Metrics(values, statistics={"miou": miou, "pixel_accuracy": accuracy}, images=len(matrices))


def _counts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each class [..., C] float64 that are found, that are true, and that are predicted."""
    exact = matrix.double()  # whole numbers below 2^53
    return exact.diagonal(dim1=-2, dim2=-1), exact.sum(-1), exact.sum(-2)


def _ious(hit: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
    return 100.0 * hit / (true + predicted - hit)  # 0 / 0 where a class is nowhere
