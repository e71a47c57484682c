"""Features of several random views of each image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvmr.data.decode import UnreadableImage
from mvmr.data.images import ArraySource, ImageSource
from mvmr.data.views import ViewMaker, Views
from mvmr.data.workers import in_workers
from mvmr.errors import RunError
from mvmr.evaluation.features import extract
from mvmr.evaluation.image_training import on_device
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder

VIEWS_AT_A_TIME = 512
"""That go through the encoder together."""
PIXELS_AT_A_TIME = 2**22
"""Of views that are made together, 48 MB: each kind of change is one call for all images, so more of them cost less."""


def several_views(recipe: str, *, size: int, count: int, flip: bool = True) -> Views:
    """The first kind of view of a named recipe, `count` times with random numbers of their own, at `size` pixels.

    flip: false takes mirror images out. Raises ValueError for a recipe that is not known.
    """
    settings = Views(recipe=recipe, size=size)
    name, view = next(iter(settings.crops.items()))
    changes: dict[str, Any] = {"count": count} if flip else {"count": count, "flip": 0.0}
    return settings.model_copy(update={"crops": {name: view.model_copy(update=changes)}})


def view_features(
    encoder: Encoder, source: ImageSource, positions: Tensor, settings: Views, workplace: Workplace, *, seed: int = 0
) -> Tensor:
    """Features [n, q, D] float32 on the CPU of the q views in `settings` of the images at `positions` [n] of a source.

    A view depends on (seed, position, its number) alone. The encoder is used as `extract` does, and normalises by its
    own card. Raises RunError where a file cannot be read.
    """
    count = sum(settings.counts().values())
    # Views in [0, 1], because the encoder normalises.
    maker = ViewMaker(settings, mean=(0.0,) * 3, std=(1.0,) * 3, seed=seed)
    positions = positions.cpu()
    together = max(1, PIXELS_AT_A_TIME // (count * settings.size**2))
    parts: list[Any] = list(torch.arange(len(positions)).split(together))
    resident = isinstance(source, ArraySource) and not source.is_mapped
    read = partial(_read, source, maker, positions)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, images in zip(
            parts, in_workers(read, parts, workers=0 if resident else workplace.workers), strict=True
        ):
            moved = on_device(images, workplace.device)
            views = [made for name, made in maker(moved, positions[rows], 0).items() if name != "plain"]
            made = torch.cat(views)  # [q, b, 3, S, S]
            index = rows + len(positions) * torch.arange(count)[:, None]  # [q, b]
            numbered = index.flatten().split(VIEWS_AT_A_TIME)
            yield from zip(numbered, made.flatten(0, 1).split(VIEWS_AT_A_TIME), strict=True)
            if workplace.progress is not None:
                workplace.progress(f"views of {source.name}", int(rows[-1]) + 1, len(positions))

    features = extract(encoder, batches(), device=workplace.device)  # [q n, D]
    return features.unflatten(0, (count, len(positions))).transpose(0, 1)


def _read(source: ImageSource, maker: ViewMaker, positions: Tensor, rows: Tensor) -> Any:
    """Images [b, 3, H, W], or of files, whose sizes differ, the crops that views begin with."""
    index = positions[rows]
    if isinstance(source, ArraySource):
        return source.gather(index)
    try:
        crops = [maker.start(source.read(position), position, 0) for position in index.tolist()]
    except UnreadableImage as error:
        raise RunError(f"{error}: it was readable before; restore it, or run again to leave it out") from None
    return {name: torch.stack([crop[name] for crop in crops]) for name in crops[0]}
