"""The two errors that a command turns into one message and an exit status, and how messages name what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """The user's input is wrong; the message names the key or file and the remedy. Commands exit with status 2."""


class RunError(RuntimeError):
    """A run failed while working (a loss that is not finite, a full disk). Commands exit with status 1."""


NOT_FINITE = (
    "features of the data set are not finite, so it cannot be labelled; training stops. The last checkpoint is intact. "
    "Lower optimizer.lr, set engine.clip_norm=1, or use engine.precision=32, then train again"
)
"""The message of a RunError where a method labels the whole data set."""


def nearest(name: Any, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known name closest to a wrong one, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
