"""The encoder, projector and prototypes of a finished SwAV or OSS training, for a student that learns by its codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from torch import Tensor, nn

from mvmr.nets.released import read_checkpoint, tensors_of
from mvmr.types import UserError

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")


def load_cluster_teacher(path: str, parts: Mapping[str, nn.Module], *, key: str) -> None:
    """Fill `parts` (encoder, projector, prototypes) with a trained network's weights; nothing in the file is executed.

    path: the folder of a run of `swav` or of `oss` (its teacher, or its student where it has none), one of its
    checkpoints, or a checkpoint released by SwAV's authors, with a ResNet of torchvision's names. key: the setting that
    gave the path, for messages. Raises UserError for files that do not hold such a network (the exported ones of a run
    hold its encoder alone), and for parts of other shapes.
    """
    file = Path(path) / LAST_CHECKPOINT if Path(path).is_dir() else Path(path)
    if file.suffix == ".safetensors":
        raise UserError(
            f"{key}={path}: is an exported file, which holds the encoder alone, and its projector and prototypes are "
            "wanted, too: give the folder of the run that wrote it"
        )
    tensors = _by_part(tensors_of(read_checkpoint(file)))
    missing = [part for part in parts if not any(name.startswith(f"{part}.") for name in tensors)]
    if missing:
        raise UserError(
            f"{key}={path}: holds no {' and no '.join(missing)}; give the folder or a checkpoint of a run of swav or "
            "oss, or a checkpoint that SwAV's authors released"
        )
    for part, module in parts.items():
        found = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        try:
            module.load_state_dict(found, strict=True)
        except RuntimeError as error:
            raise UserError(
                f"{key}={path}: its {part} does not fit; set method.teacher, method.teacher_hidden, method.dim and "
                f"method.prototypes as it was trained ({shorten(str(error), 300)})"
            ) from None


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as encoder.*, projector.* and prototypes.*, whoever wrote the file."""
    names = {name.removeprefix("module.").removeprefix("method."): name for name in tensors}
    for branch in ("teacher.", "student.", ""):
        if any(name.startswith(f"{branch}encoder.") for name in names):
            return {name.removeprefix(branch): tensors[full] for name, full in names.items()}
    released = {"projection_head.": "projector.", "prototypes.": "prototypes."}
    found = {}
    for name, full in names.items():
        head = next((start for start in released if name.startswith(start)), None)
        own = name.replace(head, released[head], 1) if head else f"encoder.{name}"
        found[own] = tensors[full]
    return found
