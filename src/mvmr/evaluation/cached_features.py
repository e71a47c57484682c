"""Frozen features, extracted once for an encoder and a data set and looked up ever after."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mvmr.data.images import ImageSource, Progress
from mvmr.evaluation.features import features_of, placed
from mvmr.nets.cards import Encoder
from mvmr.ops.modes import evaluating
from mvmr.representations.base import Representation, fixed
from mvmr.representations.cache import CacheConfig, CacheRequest, cache_representations
from mvmr.representations.cache_store import REMEDY
from mvmr.representations.teacher import described, digest
from mvmr.types import Features, RunError, UserError


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
    """Hexadecimal digits that differ whenever the features of an encoder loaded from a file may.

    Of its weights and buffers, architecture and normalisation. Of an encoder that was changed in Python it may say too
    little: hooks, a replaced forward and state outside state_dict() are not in it.
    """
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

    A pass that was killed goes on where it stopped, in whole shards. keep=False extracts without a trace: give it for
    every encoder that is not as its file has it, see `encoder_fingerprint`. Raises UserError where there is no image,
    RunError for features that are not finite and where the cache folder does not take them.
    """
    if len(source) == 0:
        raise UserError("there is no image to extract features of; look at the data set's root and split")
    what = f"features of {source.name}"
    if not keep:
        told = None if progress is None else partial(progress, what)
        return features_of(encoder, source, workers=workers, device=device, progress=told)
    request = CacheRequest(
        size=encoder.card.image_size, mean=_three(encoder.card.mean), std=_three(encoder.card.std), folder=folder,
        device=torch.device(device), workers=workers,
        progress=None if progress is None else lambda _, done, total: progress(what, done, total),
    )  # fmt: skip
    with placed(encoder, encoder.mean.device), evaluating(encoder):
        config = CacheConfig(width=None, dtype="float32")
        wanted = nn.ModuleDict({"features": EncoderFeatures(encoder)})
        try:
            rows = cache_representations(source, wanted, config, request=request)["features"]
        except RunError as error:
            raise _told(error, source.name) from None
    return Features(rows(torch.arange(len(source))), source.labels, source.classes)


def _told(error: RunError, name: str) -> RunError:
    """What the cache says in a training's words, in an evaluation's."""
    message = str(error)
    if "not finite" in message:
        return RunError(f"features of {name} are not finite: the encoder has diverged")
    for remedy in (REMEDY, "set data.cache=DIR or cache=off"):
        message = message.replace(remedy, "make room there, or evaluate with --no-keep-features")
    return RunError(message)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = values  # the card allows no other number
    return first, second, third
