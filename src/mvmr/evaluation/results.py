"""Results on disk: EVALUATION-DATA.json, and what each test image contributed beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mvmr.errors import UserError
from mvmr.ops.files import write_bytes
from mvmr.types import Result

FOLDER = "results"
"""In a run folder, or in that of `mvmr evaluate --out`."""
FINGERPRINT = "fingerprint"
"""The key of it in the outcomes' metadata."""


def path_of(folder: Path, evaluation: str, data: str, *, suffix: str = "") -> Path:
    """Where one evaluation's result lies; the suffix tells the random net's from the encoder's."""
    return folder / FOLDER / f"{evaluation}-{data}{suffix}.json"


def write_result(path: Path, result: Result) -> None:
    """The result as JSON, and its outcomes as .safetensors beside it; each written beside and moved into place.

    Outcomes carry the result's fingerprint, so that no kill leaves one result's numbers beside another's outcomes.
    Raises RunError where the disk does not take them.
    """
    remedy, outcomes = "make room on the disk, or name another --out", path.with_suffix(".safetensors")
    if result.outcomes:
        tensors = {name: values.contiguous() for name, values in result.outcomes.items()}
        write_bytes(outcomes, save(tensors, {FINGERPRINT: result.fingerprint}), remedy=remedy)
    else:
        for old in (path, outcomes):  # in this order: what is left of an earlier result is no result
            with suppress(FileNotFoundError):
                old.unlink()
    # Last: a result that is there is whole.
    write_bytes(path, (json.dumps(result.as_json(), indent=2) + "\n").encode(), remedy=remedy)


def read_result(path: Path, fingerprint: str) -> Result | None:
    """The result of that fingerprint, with its outcomes; None where there is none, or it cannot be read.

    The fingerprint "", of encoders that nothing describes for certain, is never found.
    """
    if not fingerprint:
        return None
    try:
        content = json.loads(path.read_text())
        if content.get("fingerprint") != fingerprint:
            return None
        outcomes: Mapping[str, Tensor] = {}
        beside = path.with_suffix(".safetensors")
        if beside.is_file():
            with safe_open(beside, "pt") as file:
                if (file.metadata() or {}).get(FINGERPRINT) != fingerprint:
                    return None
                outcomes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        return Result(**content, outcomes=outcomes)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        return None


def folders_of(names: Sequence[str], out: Path) -> list[Path]:
    """A folder in `out` for each encoder's results. Raises UserError where two would have the same one."""
    folders = [out / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "encoder") for name in names]  # runs/a: runs-a
    kept: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        other = kept.setdefault(folder.name.casefold(), name)  # some disks do not tell a from A
        if other != name:
            raise UserError(
                f"--out {out}: results of {other} and {name} would both lie in {folder}; evaluate them one by one, "
                "with an --out for each"
            )
    return folders


def as_outcomes(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outcomes as they are kept: float32 on the CPU."""
    return {name: torch.as_tensor(each).detach().cpu().float() for name, each in values.items()}
