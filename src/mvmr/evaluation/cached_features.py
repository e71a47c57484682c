"""Frozen features, extracted once for an encoder and a data set and looked up ever after."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mvmr.data.images import ImageSource, Progress
from mvmr.evaluation.features import features_of
from mvmr.nets.cards import Encoder
from mvmr.ops.modes import evaluating
from mvmr.representations.base import Representation, fixed
from mvmr.representations.cache import CacheConfig, CacheRequest, cache_representations
from mvmr.representations.teacher import described, digest
from mvmr.types import Features, UserError


class EncoderFeatures(Representation):
    """An encoder's features as a representation, so that the cache keeps them as it keeps a teacher's: [B, D]."""

    learned = True

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def fingerprint(self) -> str:
        """Of the architecture, every weight and buffer, and the normalisation."""
        return encoder_fingerprint(self.encoder)

    @fixed
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        return self.encoder.normalised(images)


def encoder_fingerprint(encoder: Encoder) -> str:
    """Hexadecimal digits that differ whenever an encoder's features may."""
    parts = [digest(encoder), described(encoder.backbone), list(encoder.card.mean), list(encoder.card.std)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cached_features(
    encoder: Encoder,
    source: ImageSource,
    *,
    folder: Path | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    keep: bool = True,
) -> Features:
    """What `features_of` gives, kept in the cache folder (None: the usual one) in float32; the encoder stays as it is.

    A pass that was killed goes on where it stopped, in whole shards. keep=False extracts without a trace, as happens
    for an encoder whose state cannot be read. Raises UserError where there is no image, RunError as the cache does.
    """
    if len(source) == 0:
        raise UserError("there is no image to extract features of; look at the data set's root and split")
    what = f"features of {source.name}"
    if not keep:
        told = None if progress is None else partial(progress, what)
        return features_of(encoder, source, workers=workers, device=device, progress=told)
    home = encoder.mean.device
    request = CacheRequest(
        size=encoder.card.image_size, mean=_three(encoder.card.mean), std=_three(encoder.card.std), folder=folder,
        device=torch.device(device), workers=workers,
        progress=None if progress is None else lambda _, done, total: progress(what, done, total),
    )  # fmt: skip
    with evaluating(encoder):
        config = CacheConfig(width=None, dtype="float32")
        wanted = nn.ModuleDict({"features": EncoderFeatures(encoder)})
        rows = cache_representations(source, wanted, config, request=request)["features"]
    encoder.to(home)
    return Features(rows(torch.arange(len(source))), source.labels, source.classes)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = values  # the card allows no other number
    return first, second, third
