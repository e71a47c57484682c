"""The networks that are trained and kept: ResNets with stems for small images, and any timm model by name."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from mvmr.errors import UserError, nearest
from mvmr.types import Section

RESNETS = ("resnet18", "resnet34", "resnet50")
TIMM = "timm:"


class EncoderConfig(Section):
    """The network that is kept."""

    name: str = "resnet18"
    """resnet18, resnet34 or resnet50 as in torchvision, or timm:NAME for a model of timm."""
    stem: Literal["imagenet", "cifar", "mvmr"] = "imagenet"
    """imagenet: 7x7 convolution of stride 2 and max-pool; cifar: 3x3 of stride 1, no max-pool; mvmr: 3x3 of stride 1
    with the max-pool kept, as in MV-MR's code for STL10 and CIFAR20. ResNets only."""
    width: float = Field(default=1.0, gt=0, le=8)
    """Scales the channels of every stage, for runs on small machines. ResNets only."""
    zero_init_residual: bool = True
    """Start every residual block as the identity. ResNets only."""
    image_size: int | None = Field(default=None, ge=1)
    """Image side a timm model with position embeddings is made for; null: the model's own. timm only."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in RESNETS or (name.startswith(TIMM) and name != TIMM):
            return name
        raise UserError(f"no encoder of that name{nearest(name, RESNETS)}; known: {', '.join(RESNETS)}, or timm:NAME")

    @model_validator(mode="after")
    def _only_what_applies(self) -> EncoderConfig:
        if self.name.startswith(TIMM):
            unused = {"stem": "imagenet", "width": 1.0, "zero_init_residual": True}
            remedy = "applies to the ResNets only: leave it out, or take one of " + ", ".join(RESNETS)
        else:
            unused = {"image_size": None}
            remedy = "applies to timm models only: leave it out, a ResNet takes images of any size"
        given = [key for key, default in unused.items() if getattr(self, key) != default]
        if given:
            raise UserError(f"encoder.{given[0]} is set with encoder.name={self.name}, but {remedy}")
        return self


def build_encoder(config: EncoderConfig) -> tuple[nn.Module, int]:
    """A freshly initialised encoder, normalised [B, 3, H, W] -> [B, D] float, and its D.

    Raises UserError for a timm name that timm does not know, or a size that the model cannot take.
    """
    if config.name.startswith(TIMM):
        return build_timm(config)
    # torchvision takes about a second to import, so settings can be read without it.
    from mvmr.nets.resnet import LAYOUTS, ResNet

    net = ResNet(
        LAYOUTS[config.name], stem=config.stem, width=config.width, zero_init_residual=config.zero_init_residual
    )
    return net, net.dim


def build_timm(config: EncoderConfig, *, pretrained: bool = False) -> tuple[nn.Module, int]:
    """The timm model that `config.name` names, without classifier, and the width of what it returns."""
    import timm

    name = config.name.removeprefix(TIMM)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else "; timm.list_models() lists all"
        raise UserError(f"encoder.name={config.name}: timm {timm.__version__} has no model of that name{hint}")
    sized: dict[str, Any] = {} if config.image_size is None else {"img_size": config.image_size}
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
    except RuntimeError as error:  # for example a tag after the name that timm does not have
        raise UserError(f"encoder.name={config.name}: timm cannot make it: {error}") from error
    except (TypeError, AssertionError, ValueError) as error:
        if not sized:
            raise
        raise UserError(
            f"encoder.image_size={config.image_size}: timm's {name} cannot be made for that size ({error}); leave it "
            "out where the model takes any size, else take a multiple of its patch size"
        ) from None
    return net, _output_width(net, config)


@torch.no_grad()
def _output_width(net: nn.Module, config: EncoderConfig) -> int:
    # Measured: timm's num_features is the width before the head's own layers, which some models keep.
    side = config.image_size or timm_settings(net)["input_size"][-1]
    training = net.training
    features = net.eval()(torch.zeros(1, 3, side, side))
    net.train(training)
    if features.ndim != 2:
        raise UserError(
            f"encoder.name={config.name}: gives {list(features.shape)} per image, not one vector; take another model"
        )
    return features.shape[1]


def timm_settings(net: nn.Module) -> dict[str, Any]:
    """The record that timm keeps with a model: input_size, mean, std, tag, ..."""
    settings: Any = net.pretrained_cfg
    return settings
