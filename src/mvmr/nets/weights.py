"""Weights for others: encoder.safetensors, the card in its metadata, and the encoders that are read from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mvmr.nets.cards import Encoder, EncoderCard, seeded
from mvmr.nets.encoders import RESNETS, TIMM, EncoderConfig, build_encoder, build_timm, timm_settings
from mvmr.nets.pretrained import OPEN_CLIP, RANDOM, TORCHVISION, pretrained_timm, pretrained_torchvision
from mvmr.nets.released import CHECKPOINTS, ReleasedInput, load_released
from mvmr.types import UserError

ENCODER_FILE = "encoder.safetensors"
CARD = "mvmr"
"""The key of the card in the file's metadata."""


def save_encoder(path: str | Path, backbone: nn.Module, card: EncoderCard) -> Path:
    """Write a backbone's weights, under its own names, with the card as metadata; returns the file.

    A folder as `path` gets an encoder.safetensors. Written beside and moved into place, so that a killed process leaves
    the old file.
    """
    if card.encoder.name.startswith(OPEN_CLIP):
        raise UserError(f"{card.encoder.name}: its two towers have no card that could be read again; it is not saved")
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


def load_encoder(path: str | Path, *, released: ReleasedInput | None = None) -> Encoder:
    """The encoder of a file, a run folder or a name, on the CPU and in eval mode; nothing foreign is executed.

    path: an encoder.safetensors; a folder with one; torchvision:NAME or timm:NAME for their pretrained weights (from
    the cache or the network), with @random after the name for random ones; open_clip:ARCH/TAG for both towers of a
    CLIP; a checkpoint (.ckpt, .pt, .pth, .pth.tar) published by MV-MR's authors, whose images `released` describes (by
    default as `load_released` has it).
    Raises UserError.
    """
    name = str(path)
    if name.startswith(OPEN_CLIP):
        from mvmr.nets.clip_encoder import load_clip

        return load_clip(name)
    if name.startswith((TORCHVISION, TIMM)):
        return _load_named(name)
    file = _file_of(path)
    if file.name.endswith(CHECKPOINTS):
        _not_of_a_run(file)
        given = released or ReleasedInput()
        return load_released(file, mean=given.mean, std=given.std, image_size=given.image_size)
    card = read_card(file)
    with _opened(file) as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)
    backbone, dim = seeded(lambda: build_encoder(card.encoder), seed=0)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file}: its weights do not fit the architecture that its card names: {error}") from None
    if dim != card.dim:
        raise UserError(f"{file}: its card says {card.dim} features, its architecture has {dim}; take another file")
    return Encoder(backbone, card).eval()


def random_encoder(card: EncoderCard, seed: int) -> Encoder:
    """The card's architecture with fresh weights, the same for the same seed; in eval mode, for baselines."""
    if card.encoder.name.startswith(OPEN_CLIP):
        raise UserError(
            f"{card.encoder.name}: random weights are drawn of encoders that mvmr trains; leave --random out"
        )
    backbone, _ = seeded(lambda: build_encoder(card.encoder), seed=seed)
    return Encoder(backbone, card.model_copy(update={"method": "random"})).eval()


def _load_named(name: str) -> Encoder:
    bare, random = name.removesuffix(RANDOM), name.endswith(RANDOM)
    if bare.startswith(TIMM):
        if bare == TIMM:
            raise UserError(f"{name}: name a model of timm, for example timm:resnet18")
        config = EncoderConfig(name=bare)
        backbone, dim = seeded(lambda: build_timm(config) if random else pretrained_timm(bare), seed=0)
        card = _timm_card(backbone, dim, config)
    else:
        model = bare.removeprefix(TORCHVISION)
        if model not in RESNETS:
            known = ", ".join(TORCHVISION + resnet for resnet in RESNETS)
            raise UserError(f"{name}: of torchvision, {known} are known here; for others take timm:NAME")
        config = EncoderConfig(name=model)
        backbone, dim = seeded(lambda: build_encoder(config), seed=0)
        card = _torchvision_card(dim, config)
        if not random:
            tensors = pretrained_torchvision(model)
            backbone.load_state_dict({key: t for key, t in tensors.items() if not key.startswith("fc.")}, strict=True)
    if random:
        card = card.model_copy(update={"method": "random"})
    return Encoder(backbone, card).eval()


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


def _not_of_a_run(file: Path) -> None:
    folder = file.resolve().parent.parent
    if file.parent.name == "checkpoints" and (folder / "config.yaml").is_file():
        kept = file.with_suffix(".safetensors")
        remedy = "give that folder" if (folder / ENCODER_FILE).is_file() else "end it first with `mvmr train --resume`"
        remedy = f"give {kept.name} beside it" if kept.is_file() else remedy
        raise UserError(f"{file}: is a checkpoint to resume the run {folder} from, not an encoder; {remedy}")


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
            f"{file}: is not a readable safetensors file ({error}); give a run folder or its {ENCODER_FILE}"
        ) from None


def _as_strings(card: EncoderCard) -> dict[str, str]:
    # Metadata is text only, and safetensors writes several keys in any order: with one, equal encoders are equal files.
    return {CARD: json.dumps(card.model_dump(mode="json"))}
