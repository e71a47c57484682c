"""Settings of detectors, apart from them: torchvision, which builds them, takes a second to import."""

from __future__ import annotations

import warnings
from typing import Literal

from pydantic import Field, model_validator

from mvmr.types import Section


class DetectorConfig(Section):
    """The detector that is put on a backbone."""

    head: Literal["c4", "fpn"] = "fpn"
    """c4: proposals on the third stage's map, the fourth stage with one more batch norm on each of them (MoCo's VOC
    protocol); fpn: a feature pyramid and two linear layers."""
    min_size: int = Field(800, ge=16)
    """Shorter side that images are brought to."""
    max_size: int = Field(1333, ge=16)
    """Longest side; images that would be longer get a shorter side below `min_size`."""
    levels: tuple[int, ...] = Field((1, 2, 3, 4), min_length=1)
    """Stages that the pyramid is built on; fpn only."""
    pyramid_width: int = Field(256, ge=1)
    """Channels of the pyramid; fpn only."""
    hidden: int = Field(1024, ge=1)
    """Width of the two linear layers; fpn only."""
    mask_layers: tuple[int, ...] = (256, 256, 256, 256)
    """Channels of the convolutions of the mask head, masks only; the last is the width of its deconvolution too."""
    anchors_per_image: int = Field(256, ge=2)
    """Anchors that the proposal network's loss is computed on."""
    proposals: int = Field(1000, ge=1)
    """Proposals kept when tested; twice as many in training with c4, as many with fpn, as in detectron2."""
    regions_per_image: int = Field(512, ge=2)
    """Proposals that the heads' loss is computed on."""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """Detections of lower score are dropped."""
    detections_per_image: int = Field(100, ge=1)
    """At most so many detections."""

    @model_validator(mode="after")
    def _without_effect(self) -> DetectorConfig:
        idle = self.model_fields_set & {"levels", "pyramid_width", "hidden"} if self.head == "c4" else None
        if idle:
            warnings.warn(f"{', '.join(sorted(idle))}: without effect with head=c4", stacklevel=2)
        return self
