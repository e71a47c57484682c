"""The smallest run of every method: real digits, a net of a few thousand weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvmr.config import Run, load, parse
from mvmr.data.batches import BatchMaker
from mvmr.data.module import TrainingData
from mvmr.engine.train import Parts, build
from mvmr.methods import MVMR

COMMON: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "limit": 96, "batch_size": 16},
    "views": {"recipe": "mvmr", "size": 16},
    # Zero-initialised branches would hide half of the weights from a gradient at the first step.
    "encoder": {"name": "resnet18", "stem": "mvmr", "width": 0.125, "zero_init_residual": False},
    "optimizer": {"lr": 1.0e-3},
    "schedule": {"epochs": 2, "warmup_epochs": 0.5},
    "engine": {"accelerator": "cpu", "log_every_steps": 1, "tensorboard": False},
    "online": {"every_epochs": 0, "knn_every_epochs": 0},
    # Bit-exact comparisons are with representations computed at every step; test_cached.py has the others.
    "cache": {"enabled": False},
}

# One entry a method: what it needs beside COMMON.
METHODS: dict[str, dict[str, Any]] = {
    "mvmr": {
        "method": {"name": "mvmr", "projector": [32, 32, 32]},
        "representations": {"pixels": {}, "hog": {"bins": 8, "cell": 4}, "augmented_pixels": {}},
    },
}


def tiny(of: str = "mvmr", **changes: Any) -> Run:
    """The tiny run of a method; changes are written section__key=value."""
    settings = {**COMMON, **METHODS[of]}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings[section] = {**settings[section], name: value} if name else value
    return parse(settings)


def parts_and_data(run: Run) -> tuple[Parts, TrainingData]:
    parts = build(run)
    data = TrainingData(
        parts.source, parts.maker, batch_size=run.data.batch_size, seed=run.seed, workers=run.data.workers
    )
    return parts, data


def in_float64(maker: BatchMaker) -> BatchMaker:
    """The same maker with float64 views and features."""

    class Double(BatchMaker):
        def __call__(self, loaded: Any, device: Any = "cpu") -> Any:
            batch = maker(loaded, device)
            views = {name: view.double() for name, view in batch.views.items()}
            features = {name: value.double() for name, value in batch.representations.items()}
            return type(batch)(batch.index, views, features)

    return Double(maker.views, maker.representations)


def not_finite_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on MV-MR's loss is NaN at one step."""
    whole = MVMR.objective

    def broken(self: MVMR, embeddings: Any, batch: Any, at: Any) -> Any:
        terms = whole(self, embeddings, batch, at)
        return {**terms, "loss": terms["loss"] * float("nan")} if at.step == step else terms

    monkeypatch.setattr(MVMR, "objective", broken)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


__all__ = ["COMMON", "METHODS", "in_float64", "load", "not_finite_at", "parts_and_data", "tiny", "weights"]
