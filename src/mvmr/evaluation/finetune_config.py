"""The settings of `finetune`: which labels, which views, and how encoder and head are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from mvmr.data.view_recipes import VIEW_RECIPES, Views
from mvmr.errors import nearest
from mvmr.evaluation.image_training import REFERENCE_BATCH, Curve, over_preset
from mvmr.types import Section

SMALL = 32
"""Side in pixels up to which images are shifted by a padded crop; beyond, they are cut by a random resized crop."""
OWN: Final = "mvmr"
"""The preset whose values are the defaults."""
WAYS = ("fraction", "labels_per_class", "subset_list")
"""Settings of which one says whose labels are used."""

_STEPS = {
    "optimizer": "sgd", "batch_size": 256, "epochs": 20, "schedule": "steps", "milestones": (12, 16), "factor": 0.2,
}  # fmt: skip
_SWAV = {**_STEPS, "head_init": "uniform"}
_BARLOW_TWINS = {**_STEPS, "encoder_lr": 0.002, "head_lr": 0.5, "head_init": "normal"}
_VICREG = {"optimizer": "sgd", "batch_size": 256, "epochs": 20, "per_epoch": True, "head_init": "normal"}
_SIMCLR = {"optimizer": "sgd", "nesterov": True, "encoder_lr": 0.05, "scale_lr": True, "batch_size": 4096}

# What was read where, and what was chosen, stands in docs/finetune.md.
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    # Kinakh et al., 2024, Section 7.
    OWN: {},
    # Caron et al., NeurIPS 2020: README and eval_semisup.py.
    "swav_1": {**_SWAV, "fraction": 0.01, "encoder_lr": 0.02, "head_lr": 5.0},
    "swav_10": {**_SWAV, "fraction": 0.1, "encoder_lr": 0.01, "head_lr": 0.2},
    # Zbontar et al., ICML 2021, Appendix B.2, which gives one set of values; the start is evaluate.py's.
    "barlow_twins_1": {**_BARLOW_TWINS, "fraction": 0.01},
    "barlow_twins_10": {**_BARLOW_TWINS, "fraction": 0.1},
    # Bardes et al., ICLR 2022: README and evaluate.py.
    "vicreg_1": {**_VICREG, "fraction": 0.01, "encoder_lr": 0.03, "head_lr": 0.08},
    "vicreg_10": {**_VICREG, "fraction": 0.1, "encoder_lr": 0.01, "head_lr": 0.1},
    # Chen et al., ICML 2020, Appendix B.5; the curve and the start are the code's.
    "simclr_1": {**_SIMCLR, "fraction": 0.01, "epochs": 60},
    "simclr_10": {**_SIMCLR, "fraction": 0.1, "epochs": 30},
}


class FinetuneConfig(Section):
    """Settings of `finetune`; batch, epochs, optimiser and rate are those of MV-MR's paper (its last section)."""

    preset: Literal[
        "mvmr", "swav_1", "swav_10", "barlow_twins_1", "barlow_twins_10", "vicreg_1", "vicreg_10", "simclr_1",
        "simclr_10",
    ] = OWN  # fmt: skip
    """A published protocol, with its share of the labels; values that are not given are its own."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the training images whose labels are used, in the classes' proportions; null: all."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many images of each class instead."""
    subset_list: Path | None = None
    """Train on the images that this text file names instead, one a line."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of images, their order and their views."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the chosen images; the last epoch counts, never the best."""
    batch_size: int = Field(default=128, ge=1)
    """Images a step; cut to the number of chosen images. A remainder is left out, another one in each epoch."""
    encoder_lr: float = Field(default=1e-4, gt=0)
    """Peak rate of the encoder."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak rate of the head; null: that of the encoder."""
    scale_lr: bool = False
    """The rates are for batches of 256, and multiplied by the batch / 256."""
    head_init: Literal["zeros", "normal", "uniform"] = "zeros"
    """How the head starts; normal: weights from N(0, 0.01^2), bias 0; uniform: as PyTorch draws a linear layer."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    """How both are trained."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices and kernels; biases and norms are not decayed."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of a linear warm-up; then, or at once, the rates follow the schedule."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """cosine: half a period to 0 over the whole run; steps: constant between milestones."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Epochs from which on the rates are multiplied by `factor` once more; schedule steps only."""
    factor: float = Field(default=0.1, gt=0, le=1)
    """What the rates are multiplied by at every milestone."""
    per_epoch: bool = False
    """The cosine changes when an epoch starts; false: at every step."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each layer's rate is this times that of the layer above it; null: one rate."""
    views: str | None = None
    """A key of VIEW_RECIPES, of which the first view is taken; null: a crop and a mirror image, no colour."""
    flip: bool = True
    """false: no mirror images, for digits, letters and whatever else has a left and a right."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    freeze_batch_norm: bool = False
    """Normalise by the pretrained running statistics and leave them as they are; scale and shift are still trained."""
    freeze_encoder: bool = False
    """Train the head alone, on augmented images."""

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, given: Any) -> Any:
        companions = {"schedule": ("milestones", "factor", "per_epoch"), "optimizer": ("momentum", "nesterov")}
        settings = over_preset(given, FINETUNE_PRESETS, default=OWN, companions=companions)
        if isinstance(given, Mapping) and "fraction" not in given and any(given.get(way) is not None for way in WAYS):
            return {**settings, "fraction": None}  # other images than the preset's share
        return settings

    @field_validator("views")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in VIEW_RECIPES:
            raise ValueError(f"no views {name!r}{nearest(name, VIEW_RECIPES)}; known: {', '.join(VIEW_RECIPES)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        ways = [key for key in WAYS if getattr(self, key) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} are set; choose the images by one of them")
        if self.freeze_encoder and self.layer_decay is not None:
            raise ValueError("layer_decay has no effect with freeze_encoder; leave one of them out")
        if self.milestones and self.schedule != "steps":
            raise ValueError("milestones have no effect with schedule=cosine; set schedule=steps, or leave them out")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if self.optimizer != "sgd" and (self.nesterov or self.momentum != 0.9):
            raise ValueError(f"momentum and nesterov have no effect with optimizer={self.optimizer}; leave them out")
        return self

    def curve(self) -> Curve:
        """The multiplier of the rates by step."""
        return Curve(self.epochs, self.schedule, self.milestones, self.factor, self.per_epoch, self.warmup_epochs)

    def rate_scale(self, batch_size: int) -> float:
        """What the peak rates are multiplied by, for steps of so many images."""
        return batch_size / REFERENCE_BATCH if self.scale_lr else 1.0

    def view_settings(self, size: int) -> Views:
        """The one random view that is trained on, at `size` pixels."""
        if self.views is None and size <= SMALL:  # of "mvmr_cifar", with the border in proportion: 4 at 32 pixels
            crop = {"pad_crop": {"padding": max(1, round(size / 8))}}
            settings = Views.model_validate({"recipe": "mvmr_cifar", "size": size, "crops": {"augmented": crop}})
        elif self.views is None:  # the crop and mirror image of "mvmr", which are torchvision's defaults
            plain = {"jitter": None, "gray": 0.0, "blur": None}
            settings = Views.model_validate({"recipe": "mvmr", "size": size, "crops": {"augmented": plain}})
        else:
            settings = Views(recipe=self.views, size=size)
        name, view = next(iter(settings.crops.items()))
        changes = {"count": 1} if self.flip else {"count": 1, "flip": 0.0}
        return settings.model_copy(update={"crops": {name: view.model_copy(update=changes)}})
