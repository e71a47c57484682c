"""Cross-entropies between what a network says of an image and the cluster it was put into: DeepCluster (Caron et al.,
ECCV 2018), DeepCluster-v2 (Caron et al., NeurIPS 2020) and DeeperCluster (Caron et al., ICCV 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.ops.precision import at_least_float32


def cluster_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """DeepCluster Eq. 1, the mean over images of -ln softmax(scores)_label: [B, K], [B] int64 -> scalar.

    Computed in float32 (or float64) whatever autocast says. Raises ValueError for shapes that do not fit.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"scores [B, K] are for labels [B], not {tuple(scores.shape)} for {tuple(labels.shape)}")
    with torch.autocast(scores.device.type, enabled=False):
        return functional.cross_entropy(at_least_float32(scores), labels)


def hierarchical_cross_entropy(
    super_scores: Tensor, super_labels: Tensor, sub_scores: Tensor, sub_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """DeeperCluster's loss in its two parts, l(V f, y) and l(W_y f, z), each a mean over images (Section 3.3).

    super_scores: [B, S], of V; super_labels: [B] int64, y; sub_scores: [B, K / m], of the classifier W_y of the image's
    own super-class; sub_labels: [B], z. Their sum is -ln p(y) p(z | y), the cross-entropy of a classifier over all
    (super-class, sub-class) pairs that is so factorised. Precision and errors as `cluster_cross_entropy`'s.
    """
    return cluster_cross_entropy(super_scores, super_labels), cluster_cross_entropy(sub_scores, sub_labels)


def prototype_cross_entropy(z: Tensor, prototypes: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """DeepCluster-v2's loss of one head: every view of an image tells the cluster of that image.

    z: [B, V, D] embeddings of norm 1 of V views; prototypes: [K, D] centroids of norm 1; labels: [B] int64. The mean
    over images and views of -ln softmax(<z, c> / temperature)_label. Computed in float32 (or float64) whatever autocast
    says. Raises ValueError for shapes that do not fit.
    """
    if z.dim() != 3 or prototypes.dim() != 2 or z.shape[2] != prototypes.shape[1] or labels.shape != z.shape[:1]:
        raise ValueError(
            "embeddings [B, V, D], prototypes [K, D] and labels [B] are compared, not "
            f"{tuple(z.shape)}, {tuple(prototypes.shape)}, {tuple(labels.shape)}"
        )
    with torch.autocast(z.device.type, enabled=False):
        scores = at_least_float32(z).flatten(0, 1) @ prototypes.to(at_least_float32(z).dtype).T  # [B V, K]
        return functional.cross_entropy(scores / temperature, labels.repeat_interleave(z.shape[1]))
