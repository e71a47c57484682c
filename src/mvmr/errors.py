"""The two errors that a command turns into one message and an exit status, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong; the message names the key or file and the remedy. Commands exit with status 2."""


class RunError(RuntimeError):
    """A run failed while working (a loss that is not finite, a full disk). Commands exit with status 1."""
