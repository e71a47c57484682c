"""Results on disk: EVALUATION-DATA.json, and what each test image contributed beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvmr.errors import RunError
from mvmr.types import Result

FOLDER = "results"
"""In a run folder, or in that of `mvmr evaluate --out`."""


def path_of(folder: Path, evaluation: str, data: str, *, suffix: str = "") -> Path:
    """Where one evaluation's result lies; the suffix tells the random net's from the encoder's."""
    return folder / FOLDER / f"{evaluation}-{data}{suffix}.json"


def write_result(path: Path, result: Result) -> None:
    """The result as JSON, and its outcomes as .safetensors beside it; each written beside and moved into place.

    Raises RunError where the disk does not take them.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if result.outcomes:
            beside = path.with_name(f".{path.stem}.{os.getpid()}.part")
            save_file({name: values.contiguous() for name, values in result.outcomes.items()}, beside)
            os.replace(beside, path.with_suffix(".safetensors"))
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(result.as_json(), indent=2) + "\n")
        os.replace(beside, path)  # last: a result that is there is whole
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); make room on the disk, or name another --out"
        ) from None


def read_result(path: Path, fingerprint: str) -> Result | None:
    """The result of that fingerprint, with its outcomes; None where there is none, or it cannot be read."""
    try:
        content = json.loads(path.read_text())
        if content.get("fingerprint") != fingerprint:
            return None
        beside = path.with_suffix(".safetensors")
        outcomes: Mapping[str, Tensor] = load_file(beside) if beside.is_file() else {}
        return Result(**content, outcomes=outcomes)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        return None


def as_outcomes(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outcomes as they are kept: float32 on the CPU."""
    return {name: torch.as_tensor(each).detach().cpu().float() for name, each in values.items()}
