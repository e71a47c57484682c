"""mvmr learns image representations without labels and distils large vision models into small ones."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported when they are used: `import mvmr` and `mvmr --help` do not wait for torch.
_PUBLIC = {
    "train": "mvmr.api",
    "tune": "mvmr.api",
    "evaluate": "mvmr.api",
    "embed": "mvmr.api",
    "load_encoder": "mvmr.nets.weights",
    "UserError": "mvmr.errors",
    "RunError": "mvmr.errors",
}
_MODULES = ("losses", "representations", "methods", "nets", "data", "evaluation", "ops")

__all__ = ["RunError", "UserError", "__version__", "embed", "evaluate", "load_encoder", "train", "tune"]

if TYPE_CHECKING:
    from mvmr import data, evaluation, losses, methods, nets, ops, representations
    from mvmr.api import embed, evaluate, train, tune
    from mvmr.errors import RunError, UserError
    from mvmr.nets.weights import load_encoder


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"mvmr.{name}")
    raise AttributeError(f"module 'mvmr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
