"""The images and boxes of each training step of a detector: which, mirrored or not, and as torchvision takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mvmr.data.scene_source import Scene, SceneSource
from mvmr.ops.random import permutation, uniform

FLIP_STREAM = 0xFFFFFFD1
"""Random stream, far from those of views."""


def step_images(usable: Sequence[int], step: int, *, batch_size: int, flip: bool, seed: int) -> list[tuple[int, bool]]:
    """(position, mirrored) of a step's images: every epoch is a shuffle of all, and epochs follow without a gap.

    usable: positions of the images to train on. A pure function of its arguments.
    """
    chosen: list[tuple[int, bool]] = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, within = divmod(place, len(usable))
        order, flips = _epoch(seed, epoch, len(usable))
        chosen.append((usable[order[within]], flip and flips[within]))
    return chosen


class StepImages(Sequence[list[tuple[int, bool]]]):
    """`step_images` of a range of steps, each made when it is asked for: a run has a million of them."""

    def __init__(self, usable: Sequence[int], steps: range, *, batch_size: int, flip: bool, seed: int):
        self._steps = steps
        self._of_step = partial(step_images, usable, batch_size=batch_size, flip=flip, seed=seed)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: Any) -> Any:
        return self._of_step(self._steps[index])


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> tuple[list[int], list[bool]]:
    drawn = uniform(seed, epoch, torch.arange(count), FLIP_STREAM, 1)[:, 0]
    return permutation(seed, epoch, count).tolist(), (drawn < 0.5).tolist()


def scenes_of(source: SceneSource, chosen: Sequence[tuple[int, bool]]) -> list[Scene]:
    """The scenes of one step."""
    return [mirrored(source[position]) if flip else source[position] for position, flip in chosen]


def mirrored(scene: Scene) -> Scene:
    """The scene with left and right exchanged."""
    width = scene.image.shape[-1]
    left, top, right, bottom = scene.boxes.unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    masks = None if scene.masks is None else scene.masks.flip(-1)
    return Scene(scene.image.flip(-1), boxes, scene.labels, masks, scene.ignored, scene.name)


def as_taken(
    scenes: list[Scene], device: torch.device, with_ignored: bool
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images in [0, 1] and targets as torchvision's detectors take them: class 0 is the background."""
    images, targets = [], []
    for scene in scenes:
        height, width = scene.image.shape[1:]
        boxes = torch.minimum(scene.boxes.clamp(min=0), torch.tensor([width, height, width, height]))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scene.ignored.logical_not() | with_ignored)
        target = {"boxes": boxes[kept], "labels": scene.labels[kept] + 1}
        if scene.masks is not None:
            target["masks"] = scene.masks[kept].to(torch.uint8)
        images.append(scene.image.to(device) / 255)
        targets.append({name: value.to(device) for name, value in target.items()})
    return images, targets
