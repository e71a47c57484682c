"""Labels of a whole data set: brought together from all ranks, compared, and sampled from."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr.ops.collectives import all_reduce_sum


def of_all_ranks(values: Tensor, index: Tensor, images: int) -> Tensor:
    """One integer for every image of the data set, equal on all ranks: [images], on the values' device.

    values: [n] int64, those of this rank's images; index: [n] int64, their positions. Every image is some one rank's.
    """
    whole = values.new_zeros(images)
    whole[index.to(values.device)] = values
    return all_reduce_sum(whole)


def normalised_mutual_information(a: Tensor, b: Tensor) -> float:
    """I(A; B) / sqrt(H(A) H(B)) of two labellings [N] of the same images, in [0, 1] (DeepCluster, Section 4.1).

    1 where each tells the other, 0 where they are independent, and 0 where one of them has a single label (1 where both
    have). Labels are any integers, only their grouping counts. Raises ValueError for labellings of unequal length.
    """
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise ValueError(f"two labellings [N] of the same images are compared, not {tuple(a.shape)}, {tuple(b.shape)}")
    (_, a), (_, b) = (labels.cpu().unique(return_inverse=True) for labels in (a, b))
    joint = (a * (int(b.max()) + 1) + b).unique(return_counts=True)[1]  # the cells that occur: there are at most N
    of_a, of_b, of_both = (_entropy(counts) for counts in (a.bincount(), b.bincount(), joint))
    if of_a == 0 or of_b == 0:
        return float(of_a == of_b)
    return max(0.0, (of_a + of_b - of_both) / (of_a * of_b) ** 0.5)


def uniform_over_labels(labels: Tensor, *, official_positions: bool = False) -> Tensor:
    """Sampling weights [N] that draw every label which occurs equally often: 1 / (images with that label), on the CPU.

    Drawn in proportion to them, an image comes from each label with equal probability, and is any of the label's with
    equal probability (DeepCluster, Section 3.3, "Trivial parametrization").
    official_positions: as in DeepCluster's released code, where a drawn image's number is taken for a position in the
    list of images sorted by label: the image in place p of that list is drawn with the weight of image number p.
    """
    labels = labels.cpu()
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    weights = counts[place].double().reciprocal()
    if not official_positions:
        return weights
    mistaken = torch.empty_like(weights)
    mistaken[labels.argsort(stable=True)] = weights
    return mistaken


def _entropy(counts: Tensor) -> float:
    """In nats, of the shares that the counts are of their sum."""
    shares = counts.double() / counts.sum()
    return float(-torch.special.xlogy(shares, shares).sum())
