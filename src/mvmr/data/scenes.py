"""Scenes, images with boxes and masks of their objects: which data sets have them, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mvmr.data.coco import COCO_LAYOUT, coco_scenes
from mvmr.data.images import Progress
from mvmr.data.layouts import Split, Wanted
from mvmr.data.scene_source import Objects, Scene, SceneSource
from mvmr.data.sources import DataConfig
from mvmr.data.voc_scenes import VOC0712_LAYOUT, VOC12_LAYOUT, VOC_LAYOUT, voc_scenes
from mvmr.types import UserError

__all__ = ["SCENES", "Objects", "Scene", "SceneSource", "Scenes", "open_scenes"]


@dataclass(frozen=True)
class Scenes:
    """One entry of SCENES."""

    read: Callable[..., SceneSource]
    """read(wanted), and with masks also read(wanted, masks=, annotations=)."""
    layout: str
    """A drawing of the folders expected under data.root."""
    masks: bool = False
    """Whether its objects have masks, and other files of annotations are taken."""


SCENES: dict[str, Scenes] = {
    "voc07": Scenes(voc_scenes, VOC_LAYOUT),
    "voc0712": Scenes(voc_scenes, VOC0712_LAYOUT),
    "voc12": Scenes(voc_scenes, VOC12_LAYOUT),
    "coco": Scenes(coco_scenes, COCO_LAYOUT, masks=True),
}


def open_scenes(
    data: DataConfig,
    split: Split,
    *,
    masks: bool = False,
    annotations: Path | None = None,
    progress: Progress | None = None,
) -> SceneSource:
    """The scenes of one split, train or test; nothing is decoded yet.

    annotations: another file of COCO's instances than the split's own, as `mvmr splits` makes them. Raises UserError
    for a data set without scenes or masks, and where the folder does not fit.
    """
    entry = SCENES.get(data.name)
    if entry is None:
        raise UserError(f"data.name={data.name} has no boxes; data sets that have: {', '.join(SCENES)}")
    wanted = Wanted(data.name, split, data.root, entry.layout, cache=data.cache, progress=progress)
    if entry.masks:
        return entry.read(wanted, masks=masks, annotations=annotations)
    if masks:
        known = ", ".join(name for name, one in SCENES.items() if one.masks)
        raise UserError(f"data.name={data.name} has no masks of single objects; data sets that have: {known}")
    if annotations is not None:
        raise UserError(f"{annotations}: other annotations are files of COCO's instances, and data.name={data.name}")
    return entry.read(wanted)
