"""Retrieval by cosine similarity: how far up the images of a query's class stand in the ranking of all images."""

from __future__ import annotations

import warnings
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.features import labelled, labelled_pair
from mvmr.evaluation.measured import Metrics
from mvmr.ops.precision import full_float32
from mvmr.types import Features, Section, UserError

BLOCK = 2**22
"""Similarities ranked at a time: about 200 MiB with what is made of them."""


class RetrievalConfig(Section):
    """Settings of `retrieval`."""

    gallery: Literal["train", "test"] = "train"
    """Where each test image looks for its like: among the training images, or among the other test images."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 10)
    """Depths of the ranking at which mAP and recall are given."""


def splits(config: RetrievalConfig) -> tuple[str, str]:
    """Which splits `retrieval` looks at, as its train and test: with gallery=test, no training image is wanted."""
    return config.gallery, "test"


def retrieval(train: Features, test: Features, config: RetrievalConfig) -> Metrics:
    """{"map", "map@K" ..., "recall@K" ...} in percent: means over the test images of what `outcomes` gives.

    Test images of a class that the gallery does not show are left out, with a warning that says how many.
    Raises UserError where labels are missing or a K exceeds the gallery, RunError where features are not finite.
    """
    found = outcomes(train, test, config)
    answered = found["map"].isfinite()
    if not bool(answered.any()):
        raise UserError(
            f"retrieval.gallery={config.gallery}: no test image has another of its class there; take several images a "
            "class, of the same classes in train and test"
        )
    if not bool(answered.all()):
        missing = len(answered) - int(answered.sum())
        warnings.warn(f"retrieval leaves out {missing} test images whose class the gallery lacks", stacklevel=2)
    kept = {name: 100.0 * values[answered] for name, values in found.items()}
    return Metrics({name: values.mean().item() for name, values in kept.items()}, outcomes=kept)


@torch.no_grad()
def outcomes(train: Features, test: Features, config: RetrievalConfig) -> dict[str, Tensor]:
    """{"map", "map@K" ..., "recall@K" ...}: [M] float64 in [0, 1] each, one a test image; NaN without relevant image.

    Images are ranked by cosine similarity, the earlier of equally similar ones first, and those of the query's class
    are relevant, R in number. With rel(i) in {0, 1} the relevance of rank i, and P(i) the share of relevant images
    among the first i: "map" is sum_i P(i) rel(i) / R, over the whole ranking (Manning et al., "Introduction to
    Information Retrieval", 2008, Section 8.4); "map@K" is sum_{i <= K} P(i) rel(i) / min(K, R), as for Google Landmarks
    v2 (Weyand et al., CVPR 2020); "recall@K" is 1 where one of the first K is relevant (Oh Song et al., CVPR 2016).
    Memory beside the features does not grow with the test split. Raises as `retrieval` does.
    """
    if config.gallery == "train":
        (gallery, of_gallery), (queries, of_queries), _ = labelled_pair(train, test)
    else:
        gallery, of_gallery = queries, of_queries = labelled(test, "test")
    alone = config.gallery == "test"
    others, deepest = len(gallery) - alone, max(config.k, default=1)
    if deepest > others:
        raise UserError(f"retrieval.k={deepest}: there are {others} images to rank; take a smaller one")
    queries, gallery = functional.normalize(queries, dim=1), functional.normalize(gallery, dim=1)
    parts = []
    with torch.autocast(gallery.device.type, enabled=False), full_float32(gallery.device.type):
        for rows in torch.arange(len(queries), device=gallery.device).split(max(1, BLOCK // len(gallery))):
            similarity = queries[rows] @ gallery.T  # [b, N]
            if alone:
                similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf  # ranked last, then cut off
            order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :others]
            parts.append(_measured(of_gallery[order] == of_queries[rows, None], config.k))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measured(relevant: Tensor, k: tuple[int, ...]) -> dict[str, Tensor]:
    """From the relevance of every rank, bool [b, N]."""
    total = relevant.sum(1)  # [b]
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    precision = (relevant.cumsum(1) * relevant).double().div_(ranks)  # [b, N], 0 where the image is not relevant
    found = {"map": precision.sum(1) / total}
    found |= {f"map@{depth}": precision[:, :depth].sum(1) / total.clamp(max=depth) for depth in k}
    found |= {f"recall@{depth}": relevant[:, :depth].any(1).double() for depth in k}
    return {name: values.masked_fill(total == 0, torch.nan) for name, values in found.items()}
