"""Training a detector on scenes, and what it finds in them; shared by `detection` and `instance`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import SGD

from mvmr.data.scene_source import Scene, SceneSource
from mvmr.data.workers import in_workers
from mvmr.evaluation.box_matching import Detections
from mvmr.evaluation.detector_batches import StepImages, as_taken, scenes_of
from mvmr.evaluation.resume import Resumable
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder
from mvmr.nets.detector_config import DetectorConfig
from mvmr.ops.files import write_bytes
from mvmr.ops.modes import evaluating, seeded
from mvmr.ops.random import step_seed
from mvmr.ops.schedules import warmup_steps_down
from mvmr.types import RunError, UserError

DETECTOR_FILE = "detector.safetensors"
KEPT_EVERY = 60.0
"""Seconds between states of a training that are kept."""


def _in_order(drops: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 < share <= 1 for share in drops) or list(drops) != sorted(drops):
        raise ValueError(f"drops are {list(drops)}; give shares between 0 and 1, in order")
    return drops


Drops = Annotated[tuple[float, ...], AfterValidator(_in_order)]
Sizes = tuple[Annotated[int, Field(ge=16)], ...]


class DetectorTraining(DetectorConfig):
    """How a detector is trained: stochastic gradient descent, rates that fall in steps, as in detectron2."""

    iterations: int = Field(24_000, ge=1)
    """Steps."""
    batch_size: int = Field(16, ge=1)
    """Images of a step; each epoch's order runs on into the next."""
    lr: float | None = Field(None, gt=0)
    """Peak rate; null: 0.02 x batch_size / 16."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of the gradient."""
    weight_decay: float = Field(1e-4, ge=0)
    """On all but the parameters of norms."""
    warmup: int = Field(100, ge=0)
    """Steps in which the rate rises from a thousandth of its peak."""
    drops: Drops = (3 / 4, 11 / 12)
    """After these shares of the iterations the rate is divided by ten."""
    train_sizes: Sizes = Field(tuple(range(480, 801, 32)), min_length=1)
    """Shorter sides that training images are brought to, one of these at random for each; `max_size` holds too."""
    flip: bool = True
    """Mirror half of the training images."""
    freeze_batch_norm: bool = False
    """Leave the encoder's batch norm as it was trained; by default it is trained on, with the batch's statistics."""
    precise_batch_norm: int = Field(200, ge=0)
    """After the training batch norm's running statistics are measured anew over so many batches (detectron2's precise
    batch norm); 0: those of the training stay."""
    one_class: bool = False
    """Take objects of all classes as one class, where there are too few images to learn classes from."""
    train_annotations: Path | None = None
    """Another file of COCO's instances to train on, as `mvmr splits` makes it."""
    test_annotations: Path | None = None
    """Another file of COCO's instances to measure on."""
    seed: int = 0
    """Of new layers, the order, flips, sizes, and the anchors and regions that losses are computed on."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    detector: nn.Module
    losses: list[float]
    """At every step."""

    def summary(self) -> dict[str, float]:
        """{"loss_first", "loss_last"}: means over the first and the last tenth of the steps."""
        tenth = max(1, len(self.losses) // 10)
        return {"loss_first": sum(self.losses[:tenth]) / tenth, "loss_last": sum(self.losses[-tenth:]) / tenth}


def trained_detector(
    encoder: Encoder,
    source: SceneSource,
    config: DetectorTraining,
    workplace: Workplace,
    *,
    key: str,
    masks: bool = False,
    with_ignored: bool = False,
) -> Trained:
    """A detector on a copy of the encoder, trained on the scenes that have objects.

    key: the evaluation's name, for messages; with_ignored: train on ignored objects too.
    A pure function of its arguments on the CPU, also when it is killed and called again: step s is one of (seed, s).
    Raises UserError for settings or scenes that do not fit, RunError for a loss that is not finite.
    """
    usable = [i for i, objects in enumerate(source.objects) if with_ignored or not objects.ignored.all()]
    usable = [i for i in usable if len(source.objects[i].labels)]
    if not usable:
        raise UserError(f"{key}: no training image has an object; take other annotations")
    detector, norms = _built(encoder, config, len(source.classes), masks, key)
    detector.to(workplace.device).train()
    for norm in norms:
        norm.eval().requires_grad_(False)
    optimizer = _optimizer(detector, config)
    resumable = Resumable(
        workplace.out, _settings(encoder, source, config, key, (masks, with_ignored)), every_seconds=KEPT_EVERY
    )
    losses: list[float] = []
    if (kept := resumable.kept()) is not None:
        detector.load_state_dict(kept["detector"])
        optimizer.load_state_dict(kept["optimizer"])
        losses = kept["losses"]
    batches = partial(_batches, source, usable, config, workplace, with_ignored)
    for step, images, targets in batches(range(len(losses), config.iterations)):
        for group in optimizer.param_groups:
            group["lr"] = _rate(config, step)
        with torch.enable_grad(), seeded(step_seed(config.seed, step, 0), workplace.device):
            loss = torch.stack(list(detector(images, targets).values())).sum()
            optimizer.zero_grad()
            loss.backward()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunError(f"{key}: the loss is {losses[-1]} in step {step + 1}; lower {key}.lr or raise {key}.warmup")
        optimizer.step()
        if step + 1 == config.iterations:
            resumable.every_seconds = 0  # kept whole until the detector is measured
        resumable.keep(
            lambda: {"detector": detector.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        )
        if workplace.progress is not None:
            workplace.progress(f"training for {key}", step + 1, config.iterations)
    measured = range(config.iterations, config.iterations + config.precise_batch_norm)
    _measure_batch_norm(detector, batches(measured), config, workplace, key)
    if workplace.out is not None:
        _save(workplace.out, detector, encoder, source, config, key)
    return Trained(detector, losses)


@torch.no_grad()
def detections(
    detector: nn.Module, source: SceneSource, config: DetectorTraining, workplace: Workplace
) -> Iterator[tuple[Scene, Detections]]:
    """Each scene and what the detector finds in it, on the CPU; eval mode, float32, images one by one."""
    transform: Any = detector.transform
    transform.min_size = (config.min_size,)
    with evaluating(detector):
        for done, scene in enumerate(in_workers(source.__getitem__, range(len(source)), workers=workplace.workers), 1):
            (found,) = detector([scene.image.to(workplace.device) / 255])
            masks = found["masks"][:, 0] > 0.5 if "masks" in found else None  # of probabilities, as in Mask R-CNN
            yield scene, Detections(
                found["boxes"].cpu(), found["scores"].cpu(), found["labels"].cpu() - 1,
                None if masks is None else masks.cpu(),
            )  # fmt: skip
            if workplace.progress is not None:
                workplace.progress(f"detecting in {source.name}", done, len(source))


def _built(
    encoder: Encoder, config: DetectorTraining, classes: int, masks: bool, key: str
) -> tuple[nn.Module, list[nn.Module]]:
    """The detector, and the encoder's batch norms in it if they are to be frozen."""
    from mvmr.nets.detectors import build_detector

    backbone = copy.deepcopy(encoder.backbone).requires_grad_(True)
    norms: list[nn.Module] = [part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    try:
        with seeded(config.seed, torch.device("cpu")):
            detector = build_detector(backbone.cpu(), encoder.card, config, classes=classes, masks=masks)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    transform: Any = detector.transform
    transform.min_size = config.train_sizes
    return detector, norms if config.freeze_batch_norm else []


def _batches(
    source: SceneSource,
    usable: list[int],
    config: DetectorTraining,
    workplace: Workplace,
    with_ignored: bool,
    steps: range,
) -> Iterator[tuple[int, list[Tensor], list[dict[str, Tensor]]]]:
    """(step, images, targets) of some steps."""
    chosen = StepImages(usable, steps, batch_size=config.batch_size, flip=config.flip, seed=config.seed)
    prepared = in_workers(partial(scenes_of, source), chosen, workers=workplace.workers)
    for step, scenes in zip(steps, prepared, strict=True):
        yield step, *as_taken(scenes, workplace.device, with_ignored=with_ignored)


@torch.no_grad()
def _measure_batch_norm(
    detector: nn.Module,
    batches: Iterator[tuple[int, list[Tensor], list[dict[str, Tensor]]]],
    config: DetectorTraining,
    workplace: Workplace,
    key: str,
) -> None:
    """Running statistics of batch norm anew, as the plain mean over batches under the final weights."""
    norms = [part for part in detector.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    before = [norm.momentum for norm in norms]
    for done, (step, images, targets) in enumerate(batches):
        for norm in norms if done == 0 else []:
            norm.reset_running_stats()
            norm.momentum = None
        with seeded(step_seed(config.seed, step, 0), workplace.device):
            detector(images, targets)
        if workplace.progress is not None:
            workplace.progress(f"measuring batch norm for {key}", done + 1, config.precise_batch_norm)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _optimizer(detector: nn.Module, config: DetectorTraining) -> SGD:
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    of_norms = {p for part in detector.modules() if isinstance(part, norms) for p in part.parameters()}
    trained = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in of_norms], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p in of_norms], "weight_decay": 0.0},
    ]
    return SGD([group for group in groups if group["params"]], lr=_rate(config, 0), momentum=config.momentum)


def _rate(config: DetectorTraining, step: int) -> float:
    peak = config.lr if config.lr is not None else 0.02 * config.batch_size / 16
    drops = [round(drop * config.iterations) for drop in config.drops]
    return peak * warmup_steps_down(step, drops=drops, factor=0.1, warmup_steps=config.warmup, start=1e-3)


def _settings(
    encoder: Encoder, source: SceneSource, config: DetectorTraining, key: str, options: tuple[bool, bool]
) -> dict[str, Any]:
    from mvmr.representations.teacher import digest

    return {
        "evaluation": key, "config": config.model_dump(mode="json"), "options": options, "data": source.name,
        "scenes": source.fingerprint, "encoder": digest(encoder), "card": encoder.card.model_dump(mode="json"),
    }  # fmt: skip


def _save(
    folder: Path, detector: nn.Module, encoder: Encoder, source: SceneSource, config: DetectorTraining, key: str
) -> None:
    """detector.safetensors: the weights, and in its metadata what they are."""
    card = {
        "evaluation": key, "config": config.model_dump(mode="json"), "classes": source.classes, "data": source.name,
        "encoder": encoder.card.model_dump(mode="json"),
    }  # fmt: skip
    # Copies: the format has no shared memory.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in detector.state_dict().items()}
    write_bytes(
        folder / DETECTOR_FILE, save(tensors, metadata={"mvmr_detector": json.dumps(card)}),
        remedy="make room on the disk and give the same command again: the training is kept",
    )  # fmt: skip
