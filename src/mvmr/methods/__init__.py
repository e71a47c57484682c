"""The methods, one file each."""

from __future__ import annotations

from mvmr.methods.base import Method, MethodConfig
from mvmr.methods.mvmr import MVMR

METHODS: dict[str, type[Method]] = {
    "mvmr": MVMR,
}

__all__ = ["METHODS", "MVMR", "Method", "MethodConfig"]
