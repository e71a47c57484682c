"""Where an evaluation that trains on images does its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Workplace:
    """Where an evaluation that trains on images does its work."""

    device: torch.device
    workers: int = 0
    """Processes that decode files."""
    out: Path | None = None
    """Folder for the weights that it trains; None keeps none."""
    progress: Callable[[str, int, int], None] | None = None
    """progress(what, done, total)."""
