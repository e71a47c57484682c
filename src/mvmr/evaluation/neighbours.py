"""What lies near an image in feature space: its most similar images, as a sheet of pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from mvmr.data.images import ImageSource, subset
from mvmr.evaluation.features import features_of
from mvmr.evaluation.knn import BLOCK, nearest
from mvmr.evaluation.sheets import images_of, picture, write_sheet
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.types import UserError


def neighbours(x: Tensor, queries: Tensor, k: int, *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(cosine similarity [M, k], position among x [M, k] int64) of the k most similar rows of x [N, D], falling.

    queries: [M, D]. own: [M], where each query stands in x, to be left out; None: none does. Of equally similar rows
    the earlier one comes first, as in `knn`. Raises UserError for a k that x has not enough rows for.
    """
    most = len(x) - (own is not None)
    if not 1 <= k <= most:
        raise UserError(f"k={k}: an image has {most} others to be near to; take 1 to {most}")
    x, queries = functional.normalize(x.float(), dim=1), functional.normalize(queries.float(), dim=1)
    found = []
    for rows in torch.arange(len(queries)).split(max(1, BLOCK // len(x))):
        similarity = queries[rows] @ x.T  # [b, N]
        if own is not None:
            similarity.scatter_(1, own[rows, None].to(x.device), -torch.inf)
        found.append(nearest(similarity, k))
    return torch.cat([values for values, _ in found]), torch.cat([positions for _, positions in found])


def write_neighbours(path: str | Path, queries: Tensor, near: Tensor, similarity: Tensor, *, side: int = 96) -> Path:
    """Write a PNG with one row a query: the query, then its neighbours with their similarity below.

    queries: [M, 3, H, W], uint8 or float in [0, 1]. near: [M, k, 3, H, W] likewise. similarity: [M, k]. side: pixels of
    a picture's shorter side. Raises ValueError for shapes that do not fit.
    """
    fits = queries.ndim == 4 and near.ndim == 5 and similarity.ndim == 2 and queries.shape[1] == 3
    if not fits or near.shape != (*similarity.shape, *queries.shape[1:]) or len(near) != len(queries):
        shapes = f"{list(queries.shape)}, {list(near.shape)} and {list(similarity.shape)}"
        raise ValueError(f"[M, 3, H, W], [M, k, 3, H, W] and [M, k] are needed, not {shapes}")
    rows = [[picture(image, side) for image in (query, *row)] for query, row in zip(queries, near, strict=True)]
    captions = [["query", *(f"{value:.3f}" for value in row)] for row in similarity.tolist()]
    return write_sheet(path, rows, captions)


def neighbour_sheet(
    encoder: Encoder,
    gallery: ImageSource,
    path: str | Path,
    *,
    positions: Tensor,
    queries: ImageSource | None = None,
    k: int = 8,
    workplace: Workplace | None = None,
) -> Path:
    """A `write_neighbours` sheet of the images at `positions` [M] of `queries` and their k nearest in `gallery`.

    queries: None takes them from the gallery, each leaving itself out. The features are those of `features_of`.
    Raises UserError as `neighbours` does.
    """
    place = workplace or Workplace(torch.device("cpu"))
    x = features_of(encoder, gallery, workers=place.workers, device=place.device).x
    asked = subset(gallery if queries is None else queries, positions)
    own = positions if queries is None else None
    of_asked = x[positions] if queries is None else features_of(encoder, asked, device=place.device).x
    similarity, found = neighbours(x, of_asked, k, own=own)
    size = encoder.card.image_size
    near = images_of(subset(gallery, found.flatten()), size).unflatten(0, tuple(found.shape))
    return write_neighbours(path, images_of(asked, size), near, similarity)
