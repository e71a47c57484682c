"""Weighted k nearest neighbours, as in Wu et al. (CVPR 2018, section 3.4) and DINO (Caron et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.features import accuracies, labelled_pair
from mvmr.types import Features, Section

# Similarities held at a time: 64 MiB in float32.
BLOCK = 2**24


class KNNConfig(Section):
    """Settings of the nearest-neighbour evaluation."""

    k: int = Field(default=20, ge=1)
    """Neighbours that vote; all of them where there are fewer."""
    temperature: float = Field(default=0.07, gt=0)
    """T of the weights exp(similarity / T)."""


def knn(train: Features, test: Features, config: KNNConfig) -> dict[str, float]:
    """Accuracy in percent, {"top1", "top5"}, of voting by the k most similar training images.

    A neighbour's vote counts exp(cosine / T). Of equally similar images the earlier one, and of classes with equal
    votes the lower one, comes first. A class without a vote ranks below all others. "top5" is left out for five classes
    or fewer. Raises UserError when labels are missing, RunError when features are not finite.
    """
    (x, y), (x_test, y_test), classes = labelled_pair(train, test)
    scores = votes(x, y, x_test, config, classes=classes)  # [M, C]
    return accuracies(scores, y_test)


def votes(x: Tensor, y: Tensor, queries: Tensor, config: KNNConfig, *, classes: int) -> Tensor:
    """[M, C] summed weights of the k neighbours of each query [M, D] among x [N, D]; -1 where nobody votes for a class.

    Weights are relative to each query's nearest neighbour, which changes no ranking and cannot overflow.
    """
    x, queries = functional.normalize(x, dim=1), functional.normalize(queries, dim=1)
    blocks = []
    for block in queries.split(max(1, BLOCK // len(x))):
        similarity, neighbour = nearest(block @ x.T, min(config.k, len(x)))  # [b, k] each
        weight = torch.exp((similarity - similarity[:, :1]) / config.temperature)
        label = y[neighbour]  # [b, k]
        score = torch.zeros(len(block), classes, dtype=x.dtype, device=x.device)
        for one, their in zip(
            label.T, weight.T, strict=True
        ):  # one neighbour at a time: the same order of sums anywhere
            score.scatter_add_(1, one[:, None], their[:, None])
        voted = torch.zeros_like(score, dtype=torch.bool).scatter_(1, label, True)
        blocks.append(score.masked_fill(~voted, -1.0))
    return torch.cat(blocks)


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [b, N], falling, and their columns; of equal ones the earlier columns."""
    values, columns = similarity.topk(k, dim=1)  # [b, k], arbitrary among equals
    last = values[:, -1:]
    for row in _rows_with_ties(similarity, last, k):
        above = (similarity[row] > last[row]).nonzero()[:, 0]
        equal = (similarity[row] == last[row]).nonzero()[:, 0]
        columns[row] = torch.cat([above, equal[: k - len(above)]])
    columns = columns.sort(dim=1).values
    values, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _rows_with_ties(similarity: Tensor, last: Tensor, k: int) -> Iterator[int]:
    # Only where more columns reach the k-th value than there is room for does topk have a choice.
    yield from ((similarity >= last).sum(1) > k).nonzero()[:, 0].tolist()
