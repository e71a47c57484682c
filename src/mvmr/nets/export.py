"""An encoder's weights in the files of other libraries."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mvmr.errors import nearest
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import RESNETS
from mvmr.ops.files import write_whole
from mvmr.types import UserError

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50}


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    description: str
    """One line for lists."""
    endings: tuple[str, ...]
    """Of its files, the usual one first."""
    check: Callable[[EncoderCard], None]
    """Raises UserError for encoders that it cannot hold."""
    write: Callable[[Encoder, BinaryIO, str], int]
    """write(encoder, file, ending), returns the number of tensors."""
    notes: Callable[[EncoderCard, Path], str]
    """What the reader must set to use the file."""


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    file: Path
    format: str
    tensors: int
    notes: str
    """What must be set where it is used."""


def export(encoder: Encoder, to: str, out: str | Path) -> Exported:
    """Write the encoder's weights as a key of FORMATS; beside and into place, so that a killed process leaves no part.

    Raises UserError for formats that are unknown or cannot hold the encoder, and for names of another ending; RunError
    where the disk does not take it.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: no such format{nearest(to, FORMATS)}; known: {', '.join(FORMATS)}")
    kind, file = FORMATS[to], Path(out).expanduser()
    ending = next((each for each in kind.endings if file.name.endswith(each) and file.name != each), None)
    if ending is None:
        raise UserError(f"--out {out}: {to} is written as {' or '.join(kind.endings)}; give a name that ends so")
    if file.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a file")
    kind.check(encoder.card)
    tensors = write_whole(
        file, lambda stream: kind.write(encoder, stream, ending), name=f"--out {out}",
        remedy="make room, or give another folder",
    )  # fmt: skip
    return Exported(file, to, tensors, kind.notes(encoder.card, file))


def detectron2_name(name: str) -> str:
    """detectron2's name of a ResNet's parameter or buffer, from torchvision's.

    conv1 -> stem.conv1, bn1 -> stem.conv1.norm, layer1.0.bn2 -> res2.0.conv2.norm, layer1.0.downsample.0 and .1 ->
    res2.0.shortcut and res2.0.shortcut.norm.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer([1-4])\.", lambda found: f"res{int(found[1]) + 1}.", name)
    name = re.sub(r"\bbn([1-3])\.", r"conv\1.norm.", name)
    return name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def _check_torchvision(card: EncoderCard) -> None:
    _check_resnet(card, "torchvision", ("width", 1.0))


def _check_detectron2(card: EncoderCard) -> None:
    # Its ResNet-18 and -34 have one width only; of deeper ones every width is a setting.
    _check_resnet(card, "detectron2", *([] if card.encoder.name == "resnet50" else [("width", 1.0)]))


def _check_resnet(card: EncoderCard, to: str, *wanted: tuple[str, Any]) -> None:
    encoder = card.encoder
    if encoder.name not in RESNETS:
        raise UserError(
            f"--to {to}: takes {', '.join(RESNETS)}, and this encoder is {encoder.name}; its weights are in "
            "encoder.safetensors under its own library's names"
        )
    for key, value in (("stem", "imagenet"), *wanted):
        if getattr(encoder, key) != value:
            raise UserError(
                f"--to {to}: its {encoder.name} has {key} {value}, and this encoder was trained with encoder.{key}="
                f"{getattr(encoder, key)}; train with encoder.{key}={value}, or use encoder.safetensors with mvmr's "
                "own network"
            )


def _write_torchvision(encoder: Encoder, file: BinaryIO, ending: str) -> int:
    tensors = _tensors(encoder)
    if ending == ".safetensors":
        from safetensors.torch import save

        file.write(save(tensors, metadata={"format": "pt"}))
    else:
        torch.save(tensors, file)
    return len(tensors)


def _write_detectron2(encoder: Encoder, file: BinaryIO, ending: str) -> int:
    model = {detectron2_name(name): tensor.numpy() for name, tensor in _tensors(encoder).items()}
    content = {"model": model, "__author__": "mvmr", "matching_heuristics": True}
    _ArrayPickler(file, protocol=4).dump(content)
    return len(model)


class _ArrayPickler(pickle.Pickler):
    """Arrays as shape, type and bytes: numpy 2's own way of pickling cannot be read by numpy below 1.26."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def _tensors(encoder: Encoder) -> dict[str, Tensor]:
    """Copies under torchvision's names, on the CPU."""
    return {
        name.replace("_orig_mod.", ""): tensor.detach().cpu().contiguous().clone()
        for name, tensor in encoder.backbone.state_dict().items()
    }


def _torchvision_notes(card: EncoderCard, file: Path) -> str:
    load = "safetensors.torch.load_file" if file.suffix == ".safetensors" else "torch.load"
    mean, std = (", ".join(f"{value:g}" for value in each) for each in (card.mean, card.std))
    return (
        f"net = torchvision.models.{card.encoder.name}()\n"
        "net.fc = torch.nn.Identity()\n"
        f"net.load_state_dict({load}({str(file)!r}), strict=True)\n"
        f"Images: RGB in [0, 1], less ({mean}), divided by ({std}); trained at {card.image_size} pixels."
    )


def _detectron2_notes(card: EncoderCard, file: Path) -> str:
    depth = DEPTHS[card.encoder.name]
    mean, std = ([round(255 * value, 3) for value in each] for each in (card.mean, card.std))
    lines = [
        "MODEL:",
        f'  WEIGHTS: "{file}"',
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {depth}",
        "    STRIDE_IN_1X1: False",
    ]
    if depth < 50:
        lines.append("    RES2_OUT_CHANNELS: 64")
    elif card.encoder.width != 1.0:
        stem = max(1, round(64 * card.encoder.width))
        lines += [
            f"    STEM_OUT_CHANNELS: {stem}",
            f"    WIDTH_PER_GROUP: {stem}",
            f"    RES2_OUT_CHANNELS: {4 * stem}",
        ]
    return "\n".join([*lines, "INPUT:", '  FORMAT: "RGB"'])


FORMATS: dict[str, Format] = {
    "torchvision": Format(
        "a state_dict of torchvision's ResNet without fc", (".pth", ".pt", ".safetensors"), _check_torchvision,
        _write_torchvision, _torchvision_notes,
    ),
    "detectron2": Format(
        "detectron2's pickle of a ResNet under its names", (".pkl",), _check_detectron2, _write_detectron2,
        _detectron2_notes,
    ),
}  # fmt: skip
