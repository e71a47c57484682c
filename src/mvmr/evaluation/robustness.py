"""What corruptions of the test images cost a linear classifier that was fitted on clean features."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from mvmr.data.images import ImageSource
from mvmr.data.loading import plain_batches
from mvmr.errors import nearest
from mvmr.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mvmr.evaluation.features import extract, features_of, labelled, labelled_pair, placed
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.regularisation import chosen_l2, logistic_regression
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.types import Features, RunError, Section

CLEAN = "clean"
BATCH = 256
"""Images that are corrupted and sent through at a time."""


class RobustnessConfig(Section):
    """Settings of `robustness`."""

    corruptions: tuple[str, ...] = Field(default=CORRUPTIONS, min_length=1)
    """Which ones."""
    severities: tuple[int, ...] = Field(default=SEVERITIES, min_length=1)
    """How strong, 1 to 5."""
    levels: Literal["auto", "cifar", "tiny_imagenet", "imagenet"] = "auto"
    """The table of strengths; auto: the one for the encoder's image size."""
    l2: float | None = Field(default=None, gt=0)
    """The classifier's, as in linear_fast: null chooses it on held-out training images."""
    max_iterations: int = Field(default=500, ge=1)
    """The classifier's, as in linear_fast."""
    seed: int = Field(default=0, ge=0)
    """Seed of the noise."""

    @field_validator("corruptions")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in CORRUPTIONS:
                raise ValueError(f"no corruption {name!r}{nearest(name, CORRUPTIONS)}; known: {', '.join(CORRUPTIONS)}")
        return tuple(dict.fromkeys(names))

    @field_validator("severities")
    @classmethod
    def _in_range(cls, severities: tuple[int, ...]) -> tuple[int, ...]:
        if not set(severities) <= set(SEVERITIES):
            raise ValueError(f"severities are 1 to 5, not {list(severities)}")
        return tuple(dict.fromkeys(severities))


def robustness(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: RobustnessConfig, workplace: Workplace
) -> Metrics:
    """{"top1", "corrupted", "relative_drop", "n_train", "top1/CORRUPTION" ..., "top1/CORRUPTION/SEVERITY" ...}.

    In percent, but for n_train: accuracy on the clean test images, its mean over corruptions and severities, and
    100 (top1 - corrupted) / top1. The classifier is linear_fast's, on clean training features. The encoder stays as it
    is; on the CPU a pure function of its arguments. Raises UserError for labels that do not fit, RunError when features
    are not finite.
    """
    right = outcomes(encoder, train, test, config, workplace)
    by_kind: dict[str, list[Tensor]] = {}
    for case, each in right.items():
        if case != CLEAN:
            by_kind.setdefault(case.partition("/")[0], []).append(each.double())
    corrupted = torch.stack([torch.stack(each).mean(0) for each in by_kind.values()]).mean(0)  # [M]
    return Metrics(
        {**summary(right), "n_train": float(len(train))},
        outcomes={"top1": 100.0 * right[CLEAN].double(), "corrupted": 100.0 * corrupted},
    )


def outcomes(
    encoder: Encoder, train: ImageSource, test: ImageSource, config: RobustnessConfig, workplace: Workplace
) -> dict[str, Tensor]:
    """Which test images are classified rightly, {"clean", "CORRUPTION/SEVERITY" ...: [M] bool}, in the order of test.

    As `robustness`, which is the `summary` of it.
    """
    for source, split in ((train, "train"), (test, "test")):  # before any work is done
        labelled(Features(torch.zeros(len(source), 1), source.labels, source.classes), split)
    size, device = encoder.card.image_size, workplace.device
    told = None if workplace.progress is None else partial(workplace.progress, f"features of {train.name}")
    fitted = features_of(encoder, train, workers=workplace.workers, device=device, progress=told)
    nothing = Features(torch.zeros(len(test), fitted.x.shape[1]), test.labels, test.classes)
    (x, y), (_, answers), classes = labelled_pair(fitted, nothing)
    l2 = config.l2 or chosen_l2(x, y, classes=classes, max_iterations=config.max_iterations)
    weight, bias = logistic_regression(
        x, y, classes=classes, l2=l2, max_iterations=config.max_iterations, name="robustness"
    )
    cases = {CLEAN: ("gaussian_noise", 0)}
    cases |= {f"{name}/{severity}": (name, severity) for name in config.corruptions for severity in config.severities}
    right = {case: torch.zeros(len(test), dtype=torch.bool) for case in cases}
    with placed(encoder, device):  # once, not for every case
        for index, images in plain_batches(test, batch_size=BATCH, size=size, workers=workplace.workers):
            moved = images.to(device)
            for case, (name, severity) in cases.items():
                changed = corrupt(moved, index, name, severity, seed=config.seed, levels=config.levels)
                features = extract(encoder, [(index, changed)], device=device)
                if not bool(torch.isfinite(features).all()):
                    raise RunError(f"features of {test.name}, {case}, are not finite: the encoder has diverged")
                right[case][index] = functional.linear(features, weight, bias).argmax(1) == answers[index]
            if workplace.progress is not None:
                workplace.progress(f"corrupted images of {test.name}", int(index[-1]) + 1, len(test))
    return right


def summary(right: Mapping[str, Tensor]) -> dict[str, float]:
    """The accuracies of `outcomes`, or of as many resampled ones: see `robustness`."""
    top1 = {case: 100.0 * each.double().mean().item() for case, each in right.items()}
    clean = top1.pop(CLEAN)
    by_kind: dict[str, list[float]] = {}
    for case, value in top1.items():
        by_kind.setdefault(case.partition("/")[0], []).append(value)
    means = {f"top1/{name}": sum(values) / len(values) for name, values in by_kind.items()}
    corrupted = sum(means.values()) / len(means)
    drop = 100.0 * (clean - corrupted) / clean if clean else 0.0
    single = {f"top1/{case}": value for case, value in top1.items()}
    return {"top1": clean, "corrupted": corrupted, "relative_drop": drop, **means, **single}
