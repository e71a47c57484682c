"""A training inside an evaluation that a killed process takes up where it stopped.

Evaluations leave their last state where it is: a Session removes it once the result is written. Who calls an
evaluation from Python with a `workplace.out` finds training.pt in it afterwards; a second call of the same settings
takes it up and has little left to do but test. Remove it with `forget`, or with the folder.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mvmr.ops.files import write_whole

FILE = "training.pt"
"""What is kept of an unfinished training, in its folder."""


class Resumable:
    """The state of one training in FOLDER/training.pt, written beside and into place; without a folder, nothing.

    settings: everything that makes it this training and no other, as JSON can hold it: a state kept under other
    settings is never taken up.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, every_seconds: float = 60.0):
        self.path = None if folder is None else folder / FILE
        self.settings = json.dumps(settings, sort_keys=True)
        self.every_seconds = every_seconds
        self._kept = time.monotonic()

    def kept(self) -> dict[str, Any] | None:
        """The state that a killed training of these settings left, on the CPU; None to begin anew.

        A file that cannot be read is left out of account with a warning. Nothing in it is executed.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            same, state = content["settings"] == self.settings, content["state"]
        except Exception as error:  # whatever a damaged file makes the reader raise
            warnings.warn(f"{self.path}: cannot be read ({error}); the training begins anew", stacklevel=2)
            return None
        return state if same else None

    def keep(self, state: Callable[[], dict[str, Any]]) -> bool:
        """Write state(), of tensors and plain values, if the last one is `every_seconds` old; whether it was written.

        Raises RunError where the disk does not take it; the state before it is intact then.
        """
        if self.path is None or time.monotonic() - self._kept < self.every_seconds:
            return False
        content = {"settings": self.settings, "state": state()}
        write_whole(
            self.path, lambda file: torch.save(content, file),
            remedy="the state before it is intact: make room on the disk and give the same command again",
        )  # fmt: skip
        self._kept = time.monotonic()
        return True

    def finished(self) -> None:
        """Nothing of this training is worth taking up."""
        if self.path is not None:
            forget(self.path.parent)


def forget(folder: Path) -> None:
    """Remove what a training kept in its folder, if it did."""
    with suppress(OSError):  # what cannot be removed costs room and nothing else
        (folder / FILE).unlink()
