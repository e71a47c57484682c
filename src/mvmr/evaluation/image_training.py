"""What trainings on augmented images share: checked labels, views, rates by step, and how they are taken up again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mvmr.data.images import ArraySource, ImageSource
from mvmr.data.images import digest as hashed
from mvmr.data.loading import Loaded, Loader
from mvmr.data.views import ViewMaker
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.ops.schedules import warmup_cosine, warmup_steps_down
from mvmr.representations.teacher import digest
from mvmr.types import Section, UserError

REFERENCE_BATCH = 256
"""The batch that rates are given for where they are scaled by the batch (Goyal et al., 2017)."""


@dataclass(frozen=True)
class Curve:
    """The multiplier of the peak rate at every step of a run."""

    epochs: int
    shape: Literal["cosine", "steps"] = "cosine"
    """cosine: half a period to 0 over the run; steps: constant between milestones."""
    milestones: tuple[float, ...] = ()
    """Epochs from which on the rate is multiplied by `factor` once more."""
    factor: float = 0.1
    per_epoch: bool = False
    """The cosine changes when an epoch starts, not at every step."""
    warmup_epochs: float = 0.0
    """A line up before; the cosine then has what is left of the run."""

    def at(self, step: int, steps_per_epoch: int) -> float:
        """Multiplier at `step`, counted from 0.

        Neither the first step nor the last has rate 0: with a few steps an epoch they count. Without warm-up the cosine
        is (1 + cos(pi s / S)) / 2 for step s of S, or with `per_epoch` for epoch s of S.
        """
        warmup = round(self.warmup_epochs * steps_per_epoch)
        start = 1 / (warmup + 1)
        if self.shape == "steps":
            drops = [round(milestone * steps_per_epoch) for milestone in self.milestones]
            return warmup_steps_down(step, drops=drops, factor=self.factor, warmup_steps=warmup, start=start)
        if self.per_epoch and step >= warmup:
            step = max(warmup, step // steps_per_epoch * steps_per_epoch)
        total = self.epochs * steps_per_epoch
        return warmup_cosine(step, total_steps=total + 1, warmup_steps=warmup, start=start)


def over_preset(
    given: Any, presets: Mapping[str, Mapping[str, Any]], *, default: str, companions: Mapping[str, tuple[str, ...]]
) -> Any:
    """Settings `given` by name, laid over the values of the preset that they name.

    companions: {key: keys that mean nothing under another value of it}: where `given` has another value than the
    preset, the preset's values of these are dropped too. What is no mapping, or names no preset, comes back as it is.
    """
    if not isinstance(given, Mapping):
        return given
    name = given.get("preset", default)
    values = dict(presets[name]) if isinstance(name, str) and name in presets else {}
    for key, others in companions.items():
        if key in given and given[key] != values.get(key):
            values = {name: value for name, value in values.items() if name not in others}
    return {**values, **given}


def checked_labels(train: ImageSource, test: ImageSource, evaluation: str) -> tuple[Tensor, Tensor, int]:
    """Labels [N] and [M] that can be trained on and measured by, and the number of classes. Raises UserError."""
    checked = []
    for source, split in ((train, "train"), (test, "test")):
        y = source.labels
        if y is None or len(y) == 0:
            raise UserError(f"the {split} split has no labels, and {evaluation} needs them; take a labelled data set")
        if y.ndim != 1:
            raise UserError(
                f"{evaluation} is for one label an image; {source.name} has {list(y.shape[1:])} of them: "
                "take an evaluation for several labels"
            )
        if int(y.min()) < 0:
            raise UserError(f"the {split} split has images without label (below 0); leave them out")
        checked.append(y.cpu())
    if train.classes and test.classes and train.classes != test.classes:
        raise UserError("the train and test splits have different classes; give two splits of one data set")
    return checked[0], checked[1], max(int(checked[0].max()) + 1, int(checked[1].max()) + 1, len(train.classes))


def fitting_batch(images: int, batch_size: int, evaluation: str) -> int:
    """`batch_size`, or with a warning the number of images where there are fewer."""
    if batch_size > images:
        warnings.warn(
            f"{evaluation}.batch_size is {batch_size}, and there are {images} images to train on: each step sees "
            "all of them",
            stacklevel=2,
        )
    return min(batch_size, images)


def loader_of(source: ImageSource, maker: ViewMaker, batch_size: int, workplace: Workplace, evaluation: str) -> Loader:
    """The images of a training in the order that the maker's seed draws; files arrive as crops made by the workers."""
    return Loader(
        source, batch_size=fitting_batch(len(source), batch_size, evaluation), seed=maker.seed,
        workers=workplace.workers, start=None if isinstance(source, ArraySource) else maker.start,
    )  # fmt: skip


def view_of(maker: ViewMaker, batch: Loaded, device: torch.device) -> Tensor:
    """The random view [B, 3, S, S] of a batch, normalised, on the device, channels last."""
    moved = on_device(batch.images, device)
    stream = next(iter(maker.settings.crops.values())).stream
    return maker(moved, batch.index, batch.epoch)[stream][0].contiguous(memory_format=torch.channels_last)


def on_device(images: Tensor | Mapping[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    """What a view maker takes, images or the crops that views begin with, moved without waiting."""
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return {name: crop.to(device, non_blocking=True) for name, crop in images.items()}


def in_half(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def identity(evaluation: str, encoder: Encoder, source: ImageSource, config: Section) -> dict[str, Any]:
    """What makes a training this one and no other, as JSON can hold it: net, images, labels and settings."""
    assert source.labels is not None
    return {
        "evaluation": evaluation,
        "config": config.model_dump(mode="json"),
        "data": [source.name, source.fingerprint, list(source.classes), hashed(source.labels.cpu().numpy().tobytes())],
        "encoder": [digest(encoder), encoder.card.model_dump(mode="json")],
    }


def generators(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that layers draw from, to be kept."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `generators` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
