"""Weights for others: encoder.safetensors, the card in its metadata, and the encoders that are read from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mvmr.nets.encoders import RESNETS, TIMM, EncoderConfig, build_encoder, build_timm, timm_settings
from mvmr.types import Section, UserError

ENCODER_FILE = "encoder.safetensors"
TORCHVISION = "torchvision:"
RANDOM = "@random"
CARD = "mvmr"
"""The key of the card in the file's metadata."""


class EncoderCard(Section):
    """What has to be known to use an encoder's weights."""

    encoder: EncoderConfig
    """The architecture."""
    dim: int = Field(ge=1)
    """Width of its features."""
    image_size: int = Field(ge=1)
    """Side of the images that it was trained on."""
    mean: tuple[float, ...] = Field(min_length=3, max_length=3)
    """Channel means taken from images in [0, 1]."""
    std: tuple[float, ...] = Field(min_length=3, max_length=3)
    """Channel deviations that they are then divided by."""
    method: str
    """What trained it."""
    data: str
    """What it was trained on."""
    version: str
    """Version of mvmr, or of the library that the weights are from."""


class Encoder(nn.Module):
    """A backbone that takes images as they are: uint8 [B, 3, H, W] or float in [0, 1] -> features [B, D] float32.

    Normalises with the card's mean and std; resizing to `card.image_size` is the caller's work. Raises ValueError for
    images of other shapes or types.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, card: EncoderCard):
        super().__init__()
        self.backbone = backbone
        self.card = card
        # Not in the state_dict: the card is their one home.
        self.register_buffer("mean", torch.tensor(card.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are [B, 3, H, W]; these are {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise ValueError(f"images are uint8, or float in [0, 1]; these are {images.dtype}")
        normalised = (images - self.mean) / self.std
        weight = next(self.backbone.parameters(), normalised)
        return self.backbone(normalised.to(weight.dtype)).float()  # [B, D]


def save_encoder(path: str | Path, backbone: nn.Module, card: EncoderCard) -> Path:
    """Write a backbone's weights, under its own names, with the card as metadata; returns the file.

    A folder as `path` gets an encoder.safetensors. Written beside and moved into place, so that a killed process leaves
    the old file.
    """
    file = Path(path) / ENCODER_FILE if Path(path).is_dir() else Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        # Copies: the format has neither shared memory (tied weights) nor strides (channels-last).
        name.replace("_orig_mod.", ""): tensor.detach().cpu().contiguous().clone()
        for name, tensor in backbone.state_dict().items()
    }
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside, metadata=_as_strings(card))
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return file


def read_card(path: str | Path) -> EncoderCard:
    """The card of an encoder.safetensors, or of a run folder that holds one, without reading the weights."""
    file = _file_of(path)
    with _opened(file) as content:
        metadata = content.metadata() or {}
    if CARD not in metadata:
        raise UserError(
            f"{file}: its metadata lacks {CARD!r}, so mvmr did not write it; give the encoder.safetensors "
            "of a run (its weights fit torchvision and timm, not the other way round)"
        )
    try:
        return EncoderCard.model_validate(json.loads(metadata[CARD]))
    except (ValidationError, ValueError) as error:
        raise UserError(f"{file}: its metadata is damaged or from a newer version of mvmr: {error}") from None


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a file, a run folder or a name, on the CPU and in eval mode; nothing is unpickled.

    path: an encoder.safetensors; a folder with one; torchvision:NAME or timm:NAME for their pretrained weights (from
    the cache or the network); with @random after the name for random ones. Raises UserError.
    """
    name = str(path)
    if name.startswith((TORCHVISION, TIMM)):
        return _load_named(name)
    file = _file_of(path)
    card = read_card(file)
    with _opened(file) as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)
    backbone, dim = _seeded(lambda: build_encoder(card.encoder), seed=0)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file}: its weights do not fit the architecture that its card names: {error}") from None
    if dim != card.dim:
        raise UserError(f"{file}: its card says {card.dim} features, its architecture has {dim}; take another file")
    return Encoder(backbone, card).eval()


def random_encoder(card: EncoderCard, seed: int) -> Encoder:
    """The card's architecture with fresh weights, the same for the same seed; in eval mode, for baselines."""
    backbone, _ = _seeded(lambda: build_encoder(card.encoder), seed=seed)
    return Encoder(backbone, card.model_copy(update={"method": "random"})).eval()


def _load_named(name: str) -> Encoder:
    # Built without weights first: a wrong name is told before anything is downloaded.
    bare = name.removesuffix(RANDOM)
    if bare.startswith(TIMM):
        if bare == TIMM:
            raise UserError(f"{name}: name a model of timm, for example timm:resnet18")
        config = EncoderConfig(name=bare)
        backbone, dim = _seeded(lambda: build_timm(config), seed=0)
        card = _timm_card(backbone, dim, config)
    else:
        model = bare.removeprefix(TORCHVISION)
        if model not in RESNETS:
            known = ", ".join(TORCHVISION + resnet for resnet in RESNETS)
            raise UserError(f"{name}: of torchvision, {known} are known here; for others take timm:NAME")
        config = EncoderConfig(name=model)
        backbone, dim = _seeded(lambda: build_encoder(config), seed=0)
        card = _torchvision_card(dim, config)
    if name.endswith(RANDOM):
        return Encoder(backbone, card.model_copy(update={"method": "random"})).eval()
    return Encoder(_pretrained(backbone, config, name), card).eval()


def _pretrained(backbone: nn.Module, config: EncoderConfig, name: str) -> nn.Module:
    try:
        if config.name.startswith(TIMM):
            return build_timm(config, pretrained=True)[0]
        from torchvision.models import get_model_weights

        weights: Any = get_model_weights(config.name)
        tensors = weights.DEFAULT.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        backbone.load_state_dict({key: t for key, t in tensors.items() if not key.startswith("fc.")}, strict=True)
    except Exception as error:  # whatever the download of either library raises
        raise UserError(
            f"{name}: its pretrained weights could not be had ({type(error).__name__}: {error}); connect to the "
            f"network once so that they are cached, or take {name}{RANDOM} for random weights"
        ) from error
    return backbone


def _torchvision_card(dim: int, config: EncoderConfig) -> EncoderCard:
    import torchvision
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(config.name)
    preset, version = weights.DEFAULT.transforms(), f"torchvision {torchvision.__version__}"
    return EncoderCard(
        encoder=config, dim=dim, image_size=preset.crop_size[0], mean=tuple(preset.mean), std=tuple(preset.std),
        method=f"supervised ({weights.DEFAULT.name})", data="imagenet", version=version,
    )  # fmt: skip


def _timm_card(backbone: nn.Module, dim: int, config: EncoderConfig) -> EncoderCard:
    import timm

    settings = timm_settings(backbone)
    return EncoderCard(
        encoder=config, dim=dim, image_size=settings["input_size"][-1], mean=settings["mean"], std=settings["std"],
        method=f"pretrained ({settings.get('tag') or 'no tag'})", data="see timm", version=f"timm {timm.__version__}",
    )  # fmt: skip


def _seeded(build: Callable[[], tuple[nn.Module, int]], *, seed: int) -> tuple[nn.Module, int]:
    # Weights are drawn on the CPU: its generator alone is set, and put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _file_of(path: str | Path) -> Path:
    given = Path(path)
    file = given / ENCODER_FILE if given.is_dir() else given
    if file.is_file():
        return file
    if given.is_dir():
        raise UserError(
            f"{given}: holds no {ENCODER_FILE}, which a run writes when it ends; finish it with `mvmr train --resume`, "
            "or give another folder"
        )
    hint = f"; for torchvision's own weights write {TORCHVISION}{given}" if str(given) in RESNETS else ""
    raise UserError(
        f"{given}: no such file or folder{hint}; give a run folder, an {ENCODER_FILE}, {TORCHVISION}NAME or {TIMM}NAME"
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: is not a readable safetensors file ({error}); give a run folder or its {ENCODER_FILE} "
            "(checkpoints are for `mvmr train --resume` only)"
        ) from None


def _as_strings(card: EncoderCard) -> dict[str, str]:
    # Metadata is text only, and safetensors writes several keys in any order: with one, equal encoders are equal files.
    return {CARD: json.dumps(card.model_dump(mode="json"))}
