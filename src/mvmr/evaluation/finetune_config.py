"""The settings of `finetune`: which labels, which views, and how encoder and head are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mvmr.data.view_recipes import VIEW_RECIPES, Views
from mvmr.errors import nearest
from mvmr.types import Section

SMALL = 32
"""Side in pixels up to which images are shifted by a padded crop; beyond, they are cut by a random resized crop."""


class FinetuneConfig(Section):
    """Settings of `finetune`; batch, epochs, optimiser and rate are those of MV-MR's paper (its last section)."""

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
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    """How both are trained."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices and kernels; biases and norms are not decayed."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of a linear warm-up; then, or at once, the rates follow a half cosine to 0 over the whole run."""
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

    @field_validator("views")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in VIEW_RECIPES:
            raise ValueError(f"no views {name!r}{nearest(name, VIEW_RECIPES)}; known: {', '.join(VIEW_RECIPES)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        ways = [key for key in ("fraction", "labels_per_class", "subset_list") if getattr(self, key) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} are set; choose the images by one of them")
        if self.freeze_encoder and self.layer_decay is not None:
            raise ValueError("layer_decay has no effect with freeze_encoder; leave one of them out")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if self.optimizer != "sgd" and (self.nesterov or self.momentum != 0.9):
            raise ValueError(f"momentum and nesterov have no effect with optimizer={self.optimizer}; leave them out")
        return self

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
