"""Published protocols of linear evaluation by name, and the settings of `linear` that are laid over them."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mvmr.data.view_recipes import Views
from mvmr.evaluation.image_training import REFERENCE_BATCH, Curve, over_preset
from mvmr.evaluation.linear import LinearConfig
from mvmr.types import Section

CACHED: Final = "mvmr"
"""The preset that trains on features of un-augmented images, extracted once."""

# What was read where, and what was chosen, stands in docs/evaluation/linear.md.
LINEAR_PRESETS: dict[str, dict[str, Any]] = {
    # Kinakh et al., 2024, Section 7.
    CACHED: {},  # the settings' own defaults
    # He et al., CVPR 2020, Section 4.1, and their main_lincls.py; v2 has the same.
    "moco": {
        "lr": 30.0, "batch_size": 256, "epochs": 100, "schedule": "steps", "milestones": (60, 80), "factor": 0.1,
    },
    # Chen et al., ICCV 2021: main_lincls.py, whose rates are for ResNet-50.
    "moco_v3": {"lr": 0.1, "scale_lr": True, "batch_size": 1024, "epochs": 90},
    # Caron et al., NeurIPS 2020: eval_linear.py.
    "swav": {"lr": 0.3, "batch_size": 256, "epochs": 100, "weight_decay": 1e-6},
    # Caron et al., ICCV 2021: eval_linear.py.
    "dino": {"lr": 1e-3, "scale_lr": True, "batch_size": 1024, "epochs": 100, "features": "last_blocks"},
    # Chen et al., ICML 2020, Appendices B.5 and B.6; the curve and the start are the code's.
    "simclr": {
        "lr": 0.1, "scale_lr": True, "batch_size": 4096, "epochs": 90, "per_epoch": False, "nesterov": True,
        "start": "zeros", "interpolation": "bicubic",
    },
    # Grill et al., NeurIPS 2020, Appendix C.1; the rate and the curve are the code's.
    "byol": {
        "lr": 0.2, "scale_lr": True, "batch_size": 1024, "epochs": 80, "per_epoch": False, "nesterov": True,
        "start": "zeros", "interpolation": "bicubic",
    },
    # Zbontar et al., ICML 2021, Appendix B.1, and evaluate.py.
    "barlow_twins": {"lr": 0.3, "batch_size": 256, "epochs": 100, "weight_decay": 1e-6},
    # Bardes et al., ICLR 2022: README and evaluate.py.
    "vicreg": {"lr": 0.02, "batch_size": 256, "epochs": 100, "weight_decay": 1e-6},
}  # fmt: skip

ALWAYS = ("preset", "lr", "batch_size", "epochs", "labels_per_class", "seed")
"""The settings that the cached preset has too."""


class LinearPresetConfig(Section):
    """Settings of `linear`: a preset's, and what is given over them."""

    preset: Literal[
        "mvmr", "moco", "moco_v3", "swav", "dino", "simclr", "byol", "barlow_twins", "vicreg"
    ] = CACHED  # fmt: skip
    """mvmr: on cached features of un-augmented images; the others: on images that are augmented anew in each epoch.
    Values that are not given are the preset's."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak rate."""
    scale_lr: bool = False
    """The rate is for batches of 256, and multiplied by batch_size / 256."""
    batch_size: int = Field(default=256, ge=1)
    """Images a step. On images: cut to the number of images, and a remainder is left out, another one in each epoch."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the training images; the last epoch counts, never the best."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """cosine: half a period to 0; steps: constant between milestones."""
    per_epoch: bool = True
    """The cosine changes once an epoch; false: at every step."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Epochs from which on the rate is multiplied by `factor` once more; schedule steps only."""
    factor: float = Field(default=0.1, gt=0, le=1)
    """What the rate is multiplied by at every milestone."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of stochastic gradient descent."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of weight and bias, inside the gradient."""
    start: Literal["normal", "zeros"] = "normal"
    """normal: weights from N(0, 0.01^2), bias 0."""
    crop: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of an image's area in a random crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resampled."""
    flip: bool = True
    """Mirror half of the images; false for digits, letters and whatever else has a left and a right."""
    features: Literal["output", "last_blocks"] = "output"
    """output: what the encoder gives; last_blocks: of a vision transformer with a class token, that token after the
    last blocks (DINO), of other networks their output."""
    blocks: int | None = Field(default=None, ge=1)
    """How many last blocks; null: 1 for features of 768 dimensions or more (ViT-B), else 4."""
    patches: bool | None = None
    """Also the mean of the last block's patch tokens; null: from 768 dimensions on."""
    half: bool = False
    """Compute the encoder in bf16 while training, on a GPU that has it; the layer and the test stay in float32."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many images of each class; null: on all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the start, the order, the views and the choice of images."""

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, given: Any) -> Any:
        companions = {"schedule": ("milestones", "factor", "per_epoch")}
        return over_preset(given, LINEAR_PRESETS, default=CACHED, companions=companions)

    @model_validator(mode="after")
    def _consistent(self) -> LinearPresetConfig:
        if self.preset == CACHED:
            idle = sorted(self.model_fields_set - set(ALWAYS))
            if idle:
                raise ValueError(
                    f"{', '.join(idle)}: no effect with preset={CACHED}; leave out, or take another preset"
                )
            return self
        if self.milestones and self.schedule != "steps":
            raise ValueError("milestones have no effect with schedule=cosine; set schedule=steps, or leave them out")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if self.features == "output" and (self.blocks is not None or self.patches is not None):
            raise ValueError("blocks and patches have no effect with features=output; set features=last_blocks")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop must be two numbers with 0 < least <= greatest <= 1, not {list(self.crop)}")
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = serialise(self)
        return {key: values[key] for key in ALWAYS} if self.preset == CACHED else values

    def cached(self) -> LinearConfig:
        """The settings of the layer on cached features, for the preset mvmr."""
        return LinearConfig(
            lr=self.lr, batch_size=self.batch_size, epochs=self.epochs, labels_per_class=self.labels_per_class,
            seed=self.seed,
        )  # fmt: skip

    def peak(self, batch_size: int) -> float:
        """The rate that the curve starts from, for steps of so many images."""
        return self.lr * batch_size / REFERENCE_BATCH if self.scale_lr else self.lr

    def curve(self) -> Curve:
        """The multiplier of the rate by step."""
        return Curve(self.epochs, self.schedule, self.milestones, self.factor, self.per_epoch)

    def view_settings(self, size: int) -> Views:
        """The one random view that is trained on, at `size` pixels: a crop and a mirror image."""
        view = {
            "crop": {"scale": self.crop, "interpolation": self.interpolation}, "flip": 0.5 if self.flip else 0.0,
            "jitter": None, "gray": 0.0, "blur": None,
        }  # fmt: skip
        return Views.model_validate({"recipe": "mvmr", "size": size, "crops": {"augmented": view}})


def works_on(config: LinearPresetConfig) -> Literal["features", "images"]:
    """What `linear` is given under these settings."""
    return "features" if config.preset == CACHED else "images"
