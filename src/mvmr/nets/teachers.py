"""Frozen networks to learn from: of timm, torchvision, open_clip, or files, each with the input it was made for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvmr.nets.cards import seeded
from mvmr.nets.clip import clip_teacher
from mvmr.nets.encoders import TIMM, EncoderConfig, build_timm, timm_settings
from mvmr.nets.pretrained import OPEN_CLIP, RANDOM, TORCHVISION, pretrained_timm, pretrained_torchvision
from mvmr.nets.teacher_files import fit_weights
from mvmr.nets.teacher_net import Interpolation, Output, TeacherInput, TeacherNet, near, whole
from mvmr.nets.weights import load_encoder
from mvmr.types import UserError


def load_teacher(
    model: str, *, weights: Path | None = None, output: Output = "vector", image_size: int | None = None
) -> TeacherNet:
    """The network that a name or path stands for, on the CPU.

    model: timm:NAME, torchvision:NAME or open_clip:ARCH/TAG for pretrained weights; with @random after NAME or ARCH for
    random ones; else what `load_encoder` takes. weights: a local file for a named architecture, .safetensors or a
    checkpoint, read without executing anything in it. output: its vector, or its features before pooling.
    image_size: another side than its own, for nets that can take it.
    Raises UserError for what is unknown, not to be had, or does not fit.
    """
    if weights is not None and (model.endswith(RANDOM) or not model.startswith((TIMM, TORCHVISION, OPEN_CLIP))):
        raise UserError(
            f"weights={weights}: is for a named architecture (timm:, torchvision:, open_clip:), and model={model} "
            "brings its own weights; leave one of the two out"
        )
    if model.startswith(TIMM):
        net = _timm(model, weights, output, image_size)
    elif model.startswith(TORCHVISION):
        net = _torchvision(model, weights, output)
    elif model.startswith(OPEN_CLIP):
        net = clip_teacher(model, weights, output, image_size)
    else:
        net = _own(model, output, image_size)
    net.image_size = image_size or net.image_size
    _check(net, output)
    return net


def resnet_map(net: Any, images: Tensor) -> Tensor:
    """A ResNet's last map [B, C, h, w], before the average over it."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def timm_features(net: Any, images: Tensor) -> Tensor:
    """A timm model's features before pooling: tokens [B, T, D] or a map [B, C, h, w]."""
    features = net.forward_features(images)
    # Swin's maps have their channels last; timm says so by an attribute.
    last = isinstance(features, Tensor) and features.ndim == 4 and str(getattr(net, "output_fmt", "")) == "NHWC"
    return features.movedim(-1, 1) if last else features


def _timm(model: str, weights: Path | None, output: Output, image_size: int | None) -> TeacherNet:
    bare = model.removesuffix(RANDOM)
    if bare == TIMM:
        raise UserError(f"{model}: name a model of timm, for example timm:vit_base_patch16_224")
    named = weights is None and bare == model
    config = EncoderConfig(name=bare)
    net, _ = seeded(lambda: pretrained_timm(bare) if named else build_timm(config), seed=0)
    settings = timm_settings(net)
    if weights is not None:
        dropped = settings.get("classifier") or ()
        fit_weights(net, weights, (dropped,) if isinstance(dropped, str) else tuple(dropped))
    side = settings["input_size"][-1]
    _resize(net, side, image_size)
    # Only the two that torch has; timm's "random" is for its training.
    interpolation: Interpolation = "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic"
    given = TeacherInput(side, tuple(settings["mean"]), tuple(settings["std"]), interpolation)
    if output == "vector":
        return TeacherNet(net, whole, given, name=model)
    return TeacherNet(net, timm_features, given, name=model, prefix_tokens=getattr(net, "num_prefix_tokens", 0))


def _torchvision(model: str, weights: Path | None, output: Output) -> TeacherNet:
    from torchvision import models

    name = model.removeprefix(TORCHVISION).removesuffix(RANDOM)
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"{model}: torchvision has no classification model {name!r}{near(name, known)}")
    published: Any = models.get_model_weights(name)
    pretrained = weights is None and not model.endswith(RANDOM)
    tensors = pretrained_torchvision(name) if pretrained else None
    # Transformers are made for one size; the weights say which.
    sized = {"image_size": published.DEFAULT.meta["min_size"][0]} if name.startswith("vit_") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # two old models say that their random weights will change
        net = seeded(lambda: models.get_model(name, weights=None, **sized), seed=0)
    if tensors is not None:
        net.load_state_dict(tensors, strict=True)
    if pretrained and name in ("googlenet", "inception_v3"):
        net.transform_input = True  # their weights expect another normalisation, which the model then does itself
    classifier = _without_classifier(net, model)
    if weights is not None:
        fit_weights(net, weights, (classifier,))
    preset = published.DEFAULT.transforms()
    interpolation: Interpolation = "bilinear" if preset.interpolation.value == "bilinear" else "bicubic"
    given = TeacherInput(preset.crop_size[0], tuple(preset.mean), tuple(preset.std), interpolation)
    if output == "vector":
        return TeacherNet(net, whole, given, name=model)
    if not isinstance(net, models.ResNet):
        raise UserError(
            f"{model}: features before pooling are known of torchvision's ResNets only; take output=vector, or a model "
            "of timm"
        )
    return TeacherNet(net, resnet_map, given, name=model)


def _without_classifier(net: nn.Module, model: str) -> str:
    """Replace the last linear layer, which classifies, by the identity; returns its name."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"{model}: ends in no linear classifier that could be taken off; take another model")
    parent, _, last = linear[-1].rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())
    return linear[-1]


def _own(model: str, output: Output, image_size: int | None) -> TeacherNet:
    encoder = load_encoder(model)
    card, net = encoder.card, encoder.backbone
    given = TeacherInput(card.image_size, card.mean, card.std, "bilinear")
    # Where the file is does not matter: what it holds does.
    name = card.encoder.model_dump_json()
    if card.encoder.name.startswith(TIMM):
        _resize(net, card.encoder.image_size or card.image_size, image_size)
        prefix = getattr(net, "num_prefix_tokens", 0)
        if output == "features":
            return TeacherNet(net, timm_features, given, name=name, prefix_tokens=prefix)
    # The other kind of encoder is our ResNet.
    return TeacherNet(net, whole if output == "vector" else resnet_map, given, name=name)


def _resize(net: Any, side: int, wanted: int | None) -> None:
    # Those of timm's models that are made for one size have this method; the others take any.
    if wanted not in (None, side) and callable(getattr(net, "set_input_size", None)):
        try:
            net.set_input_size(img_size=(wanted, wanted))
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"image_size={wanted}: does not fit the model ({error}); its own is {side}") from None


@torch.no_grad()
def _check(net: TeacherNet, output: Output) -> None:
    """One black image through the network tells whether size and output are what was asked for."""
    assert net.image_size is not None
    try:
        made: Any = net(torch.zeros(1, 3, net.image_size, net.image_size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"{net.name}: does not take images of {net.image_size} pixels ({error}); leave image_size out"
                        ) from None  # fmt: skip
    good = {"vector": (2,), "features": (3, 4)}[output]
    if not isinstance(made, Tensor) or made.ndim not in good:
        what = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        other = "features" if output == "vector" else "vector"
        raise UserError(f"{net.name}: output={output} gives {what} per image; take output={other} or another model")
