"""A linear head saved beside an encoder: head.safetensors, and the accuracy it gives without any training."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mvmr.evaluation.features import accuracies, labelled
from mvmr.types import Features, Section, UserError

HEAD_FILE = "head.safetensors"
META = "mvmr"
"""The key of what is written in the file's metadata."""


@dataclass(frozen=True)
class Head:
    """A linear classifier of features."""

    weight: Tensor
    """[C, D] float32."""
    bias: Tensor
    """[C] float32."""
    classes: tuple[str, ...] = ()
    """Names of the C classes; empty where they have none."""

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [N, C] of features [N, D]."""
        return functional.linear(x, self.weight.to(x), self.bias.to(x))


class HeadConfig(Section):
    """Settings of `head`."""

    folder: Path | None = None
    """Where head.safetensors lies; null: beside the encoder."""


def head(train: Features, test: Features, config: HeadConfig) -> dict[str, float]:
    """{"top1", "top5"} on the test features of the saved head; `train` is not looked at, nothing is trained.

    Top5 is left out for five classes or fewer. Raises UserError when the head is missing or does not fit the features
    or the classes, or labels are missing; RunError when features are not finite.
    """
    if config.folder is None:
        raise UserError(f"head.folder is not set; give the folder that holds {HEAD_FILE}, or a run folder as encoder")
    x, y = labelled(test, "test")
    saved = load_head(config.folder)
    count, width = saved.weight.shape
    if x.shape[1] != width:
        raise UserError(
            f"head.folder={config.folder}: its head is for features of {width} dimensions, the encoder's have "
            f"{x.shape[1]}; take the encoder that it was saved with"
        )
    if saved.classes and test.classes and saved.classes != test.classes:
        differing = [name for name in saved.classes if name not in test.classes]
        detail = f", for example {differing[0]}" if differing else ", or another order of them"
        raise UserError(
            f"head.folder={config.folder}: its head was trained for other classes than the data set's{detail}; "
            "evaluate on the data set that it was trained on"
        )
    if int(y.max()) >= count:
        raise UserError(
            f"head.folder={config.folder}: its head knows {count} classes, and the test split has label {int(y.max())}"
            "; evaluate on the data set that it was trained on"
        )
    return accuracies(saved(x), y)


def save_head(folder: str | Path, weight: Tensor, bias: Tensor, classes: tuple[str, ...] = ()) -> Path:
    """Write weight [C, D] and bias [C] in float32, with the classes' names, as folder/head.safetensors; returns it.

    Written beside and moved into place. Raises ValueError for shapes that do not fit together.
    """
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(classes) not in (0, len(weight)):
        shapes = f"{list(weight.shape)}, {list(bias.shape)} and {len(classes)} classes"
        raise ValueError(f"a head has weight [C, D], bias [C] and C names or none; these are {shapes}")
    file = Path(folder) / HEAD_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().clone()
        for name, tensor in (("weight", weight), ("bias", bias))
    }
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside, metadata={META: json.dumps({"classes": list(classes)})})
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return file


def load_head(folder: str | Path) -> Head:
    """The head in a folder, on the CPU. Raises UserError when there is none, or the file is not one of ours."""
    file = Path(folder).expanduser() / HEAD_FILE
    if not file.is_file():
        raise UserError(
            f"{folder}: holds no {HEAD_FILE}; `mvmr evaluate RUN --on finetune` writes one into RUN/finetune-DATA, and "
            "a run with labels and online.head its own; give that folder as the encoder, or as head.folder"
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            weight, bias = content.get_tensor("weight"), content.get_tensor("bias")
            metadata = content.metadata() or {}
        classes = tuple(str(name) for name in json.loads(metadata[META])["classes"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file}: is not a head that mvmr wrote ({error}); write it anew") from None
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(classes) not in (0, len(weight)):
        raise UserError(f"{file}: its weight, bias and classes do not fit together; write it anew")
    return Head(weight, bias, classes)
