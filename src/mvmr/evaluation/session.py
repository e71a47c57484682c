"""Every evaluation of one encoder: its features are extracted once, what was finished before is taken up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mvmr.data.images import ImageSource, Progress, digest
from mvmr.data.sources import DataConfig, open_source
from mvmr.evaluation import EVALUATIONS, Workplace
from mvmr.evaluation.cached_features import cached_features, encoder_fingerprint
from mvmr.evaluation.head import HEAD_FILE
from mvmr.evaluation.measured import Metrics, with_intervals
from mvmr.evaluation.results import as_outcomes, path_of, read_result, write_result
from mvmr.evaluation.resume import forget
from mvmr.nets.cards import Encoder
from mvmr.types import Features, Result

VERSION = 2
"""Raised when evaluations change what they measure, so that older results are not taken for theirs."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One data set and one list of evaluations, for as many encoders as are given to `results`."""

    data: DataConfig
    evaluations: Mapping[str, Any]
    """{name of EVALUATIONS: its settings}."""
    device: torch.device
    resume: bool = False
    """Take finished results of the same encoder, images and settings from the folder."""
    keep_features: bool = True
    """Keep features in the cache folder, and look there first."""
    from_file: bool = True
    """False of an encoder given as an object, of which no fingerprint says for certain what it computes: its features
    are not kept, and its results are written without a fingerprint, so that they are never taken up."""
    progress: Progress | None = None
    sources: dict[tuple[str, int], ImageSource] = field(default_factory=dict)
    """{(split, size): images} opened so far; several sessions may share them."""

    def results(self, encoder: Encoder, name: str, folder: Path | None, *, suffix: str = "") -> Iterator[Result]:
        """Results one by one, as they are made; each is in the folder before the next is begun.

        folder: gets results/EVALUATION-DATA.json and the networks that are trained; None keeps nothing. suffix: to the
        names of the files there.
        """
        seconds = 0.0  # of the features, which all evaluations on them share

        @cache
        def features(split: str) -> Features:
            nonlocal seconds
            started = time.monotonic()
            made = cached_features(
                encoder, self.source(split, encoder), folder=self.data.cache, workers=self.data.workers,
                device=self.device, progress=self.progress, keep=self.keep_features and self.from_file,
            )  # fmt: skip
            seconds += time.monotonic() - started
            return made

        for kind, config in self.evaluations.items():
            path = None if folder is None else path_of(folder, kind, self.data.name, suffix=suffix)
            fingerprint = self._fingerprint(encoder, kind, config) if path is not None and self.from_file else ""
            if path is not None and self.resume:
                found = read_result(path, fingerprint)
                if found is not None:
                    yield found
                    continue
            on = EVALUATIONS[kind].given(config)
            function, started = EVALUATIONS[kind].function, time.monotonic()
            out = None if folder is None else folder / f"{kind}-{self.data.name}{suffix}"
            place = Workplace(self.device, self.data.workers, out, self.progress)
            splits = EVALUATIONS[kind].splits(config)
            if on == "features":
                train, test = (features(split) for split in splits)
                started = time.monotonic() - seconds
                metrics = function(train, test, config)
            elif on == "images":
                metrics = function(encoder, *(self.source(split, encoder) for split in splits), config, place)
            else:
                metrics = function(encoder, self.data, config, place)
            known = metrics if isinstance(metrics, Metrics) else Metrics(metrics)
            result = Result(
                kind, self.data.name, getattr(config, "split", "test"), with_intervals(known),
                config.model_dump(mode="json"), name, time.monotonic() - started, fingerprint,
                as_outcomes(known.outcomes), known.statistics, known.images,
            )  # fmt: skip
            if path is not None:
                write_result(path, result)
            if out is not None:
                forget(out)  # not before: a kill until here costs no training
            yield result

    def source(self, split: str, encoder: Encoder) -> ImageSource:
        """The images of a split at the encoder's size, opened once."""
        key = (split, encoder.card.image_size)
        if key not in self.sources:
            size = encoder.card.image_size
            self.sources[key] = open_source(self.data, split, size=size, progress=self.progress)  # type: ignore[arg-type]
        return self.sources[key]

    def _fingerprint(self, encoder: Encoder, kind: str, config: Any) -> str:
        data = self.data.model_dump(mode="json", exclude={"cache", "workers", "batch_size", "download"})
        own = EVALUATIONS[kind].fingerprints
        if own is not None:
            images: Any = dict(own(self.data, config))
        else:
            images = [_of_source(self.source(split, encoder)) for split in EVALUATIONS[kind].splits(config)]
        parts = [VERSION, encoder_fingerprint(encoder), encoder.card.image_size, kind, data, images, _contents(config)]
        described = json.dumps([*parts, config.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:32]


def _of_source(source: ImageSource) -> list[Any]:
    labels = b"" if source.labels is None else source.labels.cpu().numpy().tobytes()
    return [source.fingerprint, list(source.classes), digest(labels)]


def _contents(config: Any) -> dict[str, list[str]]:
    """{setting that is a file, or the folder of a head: its hash}: a list of class names may change in its place."""
    found: dict[str, list[str]] = {}
    for name, value in config:
        if isinstance(value, Path):
            place = value.expanduser()
            files = [place / HEAD_FILE] if place.is_dir() else [place]
            found[name] = [f"{file.name} {_hash_of(file)}" for file in files if file.is_file()]
    return found


def _hash_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
