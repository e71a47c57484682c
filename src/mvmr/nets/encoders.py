"""The networks that are trained and kept: ResNets with stems for small images, plain nets, any timm model by name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from torch import nn

from mvmr.errors import UserError, nearest
from mvmr.types import Section

RESNETS = ("resnet18", "resnet34", "resnet50")
PLAIN = ("alexnet", "vgg16")
TIMM = "timm:"
TIMMS_NAME = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "drop_path": "drop_path_rate",
    "any_size": "dynamic_img_size",
}
"""What timm's constructors call the settings that are passed to them; not all models take all."""
REMEDIES = {
    "image_size": "leave encoder.image_size out where the model takes any size, else take a multiple of its patch size",
    "patch_size": "leave encoder.patch_size out, or take a vision transformer, whose patches can be of any size",
    "drop_path": "leave encoder.drop_path out, or take a model with residual branches that can be dropped",
    "any_size": "leave encoder.any_size out: only vision transformers have position embeddings to interpolate",
}


class EncoderConfig(Section):
    """The network that is kept."""

    name: str = "resnet18"
    """resnet18, resnet34 or resnet50 as in torchvision; alexnet or vgg16 with batch norm, as DeepCluster has them,
    without their last ReLU; or timm:NAME for a model of timm."""
    stem: Literal["imagenet", "cifar", "mvmr"] = "imagenet"
    """imagenet: 7x7 convolution of stride 2 and max-pool; cifar: 3x3 of stride 1, no max-pool; mvmr: 3x3 of stride 1
    with the max-pool kept, as in MV-MR's code for STL10 and CIFAR20. ResNets only."""
    width: float = Field(default=1.0, gt=0, le=8)
    """Scales the channels of every layer, for runs on small machines. Not for timm models."""
    zero_init_residual: bool = True
    """Start every residual block as the identity. ResNets only."""
    sobel: bool = False
    """Give the network the two fixed Sobel derivatives of the grey image in place of colours (DeepCluster, Section
    3.4). alexnet and vgg16 only."""
    image_size: int | None = Field(default=None, ge=1)
    """Image side a timm model with position embeddings is made for; null: the model's own. timm only."""
    patch_size: int | None = Field(default=None, ge=1)
    """Side of a vision transformer's patches; null: the model's own. timm only."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of images for which the last residual branch is dropped while training; rises linearly with depth from 0
    (stochastic depth, Huang et al., ECCV 2016). timm only."""
    any_size: bool = False
    """Interpolate position embeddings to each image's size, so that a vision transformer takes local views too. timm
    only."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        own = (*RESNETS, *PLAIN)
        if name in own or (name.startswith(TIMM) and name != TIMM):
            return name
        raise UserError(f"no encoder of that name{nearest(name, own)}; known: {', '.join(own)}, or timm:NAME")

    @model_validator(mode="after")
    def _only_what_applies(self) -> EncoderConfig:
        of_timm, plain = self.name.startswith(TIMM), self.name in PLAIN
        unused: dict[str, tuple[str, str]] = {}  # {key: (what it is for, another remedy)}
        if of_timm or plain:
            resnets = "the ResNets", "take one of " + ", ".join(RESNETS)
            unused |= dict.fromkeys(("stem", "zero_init_residual", *(("width",) if of_timm else ())), resnets)
        if not plain:
            unused["sobel"] = "alexnet and vgg16", "take one of these"
        if not of_timm:
            timms = "timm models", "take one of these (a ResNet takes images of any size)"
            unused |= dict.fromkeys(("image_size", "patch_size", "drop_path", "any_size"), timms)
        wrong = []
        for key, (of, other) in unused.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default:
                # The recipe may have set it, which an override cannot take out again.
                back = default if isinstance(default, str) else json.dumps(default)
                wrong.append(
                    f"encoder.{key} is set with encoder.name={self.name}, but applies to {of} only: set it back to "
                    f"encoder.{key}={back}, or {other}"
                )
        if wrong:
            raise UserError("; ".join(wrong))
        if self.patch_size and self.image_size and self.image_size % self.patch_size:
            raise UserError(
                f"encoder.image_size={self.image_size} is no multiple of encoder.patch_size={self.patch_size}: the "
                "rest of the image would not be seen; take a patch size that divides it"
            )
        return self


def build_encoder(
    config: EncoderConfig, *, side: int | None = None, local_sides: Iterable[int] = (), section: str = "encoder"
) -> tuple[nn.Module, int]:
    """A freshly initialised encoder, normalised [B, 3, H, W] -> [B, D] float, and its D.

    side: of the images that it will get, where known, so that a model made for another size is refused at once;
    local_sides: the sides of further views that it must take. section: of the run's settings, where `config` stands.
    Raises UserError for a timm name that timm does not know, or settings or sizes that the model cannot take.
    """
    try:
        return _built(config, side, local_sides)
    except UserError as error:
        raise UserError(_in_section(str(error), section)) from error.__cause__


def named_in(section: str) -> WrapValidator:
    """For settings of a network that stand in another section than `encoder`: mistakes are told by its keys."""

    def checked(given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            if problem["loc"] or problem["type"] != "value_error":  # told by its whole key anyway
                raise
            raise UserError(_in_section(str(problem["ctx"]["error"]), section)) from None

    return WrapValidator(checked)


def _in_section(message: str, section: str) -> str:
    return re.sub(r"\bencoder\.", f"{section}.", message)


def _built(config: EncoderConfig, side: int | None, local_sides: Iterable[int]) -> tuple[nn.Module, int]:
    if config.name.startswith(TIMM):
        net, width = build_timm(config, side=side)
        for local in local_sides:
            _check_takes(net, config, local)
        return net, width
    if config.name in PLAIN:
        from mvmr.nets.plain import LAYOUTS as PLAIN_LAYOUTS
        from mvmr.nets.plain import PlainNet

        layout = PLAIN_LAYOUTS[config.name]
        _check_sides(config, layout.least_side, side, local_sides)
        plain = PlainNet(layout, width=config.width, sobel=config.sobel)
        return plain, plain.dim
    # torchvision takes about a second to import, so settings can be read without it.
    from mvmr.nets.resnet import LAYOUTS, ResNet

    net = ResNet(
        LAYOUTS[config.name], stem=config.stem, width=config.width, zero_init_residual=config.zero_init_residual
    )
    return net, net.dim


def build_timm(config: EncoderConfig, *, pretrained: bool = False, side: int | None = None) -> tuple[nn.Module, int]:
    """The timm model that `config.name` names, without classifier, and the width of what it returns."""
    import timm

    name = config.name.removeprefix(TIMM)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else "; timm.list_models() lists all"
        raise UserError(f"encoder.name={config.name}: timm {timm.__version__} has no model of that name{hint}")
    given = {TIMMS_NAME[key]: getattr(config, key) for key in TIMMS_NAME if getattr(config, key)}
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, **given)
    except RuntimeError as error:  # for example a tag after the name that timm does not have
        raise UserError(f"encoder.name={config.name}: timm cannot make it: {error}") from error
    except (TypeError, AssertionError, ValueError) as error:
        if not given:
            raise
        raise UserError(_refused(config, name, error)) from None
    return net, output_width(net, config, side)


def _refused(config: EncoderConfig, name: str, error: Exception) -> str:
    """What to say of settings that timm's model does not take: the one that its error names, or all that are given."""
    given = [key for key in TIMMS_NAME if getattr(config, key)]
    named = [key for key in given if f"'{TIMMS_NAME[key]}'" in str(error)] or given
    settings = ", ".join(f"encoder.{key}={getattr(config, key)}" for key in named)
    remedies = "; ".join(REMEDIES[key] for key in named)
    return f"{settings}: timm's {name} cannot be made so ({error}); {remedies}"


@torch.no_grad()
def output_width(net: nn.Module, config: EncoderConfig, side: int | None = None) -> int:
    """Width of what a timm model of `config` gives an image. Raises UserError if that is no vector, or for the side."""
    # Measured: timm's num_features is the width before the head's own layers, which some models keep.
    made_for = config.image_size or timm_settings(net)["input_size"][-1]
    training = net.training
    try:
        features = net.eval()(torch.zeros(1, 3, side or made_for, side or made_for))
    except (AssertionError, RuntimeError, ValueError) as error:
        if side in (None, made_for):
            raise
        raise UserError(
            f"encoder.name={config.name} is made for images of {made_for} pixels and cannot take the run's, of {side} "
            f"(views.size): set encoder.image_size={side}, with a patch size that divides it, or set "
            f"views.size={made_for} ({error})"
        ) from None
    net.train(training)
    if features.ndim != 2:
        raise UserError(
            f"encoder.name={config.name}: gives {list(features.shape)} per image, not one vector; take another model"
        )
    return features.shape[1]


def _check_sides(config: EncoderConfig, least: int, side: int | None, local_sides: Iterable[int]) -> None:
    small = [given for given in (side, *local_sides) if given is not None and given < least]
    if small:
        raise UserError(
            f"encoder.name={config.name} takes images of {least} pixels or more, and the run has views of {small[0]}: "
            f"set views.size={least} or more (and views.crops likewise), or take a ResNet"
        )


def _check_takes(net: nn.Module, config: EncoderConfig, side: int) -> None:
    try:
        output_width(net, config, side)
    except UserError:
        raise UserError(
            f"encoder.name={config.name} cannot take the run's views of {side} pixels: set encoder.any_size=true for a "
            "vision transformer, with a patch size that divides every view, or give views.crops other sizes"
        ) from None


def timm_settings(net: nn.Module) -> dict[str, Any]:
    """The record that timm keeps with a model: input_size, mean, std, tag, ..."""
    settings: Any = net.pretrained_cfg
    return settings
