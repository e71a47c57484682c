"""The smallest run of every method: real digits, a net of a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mvmr.config import Run, load, parse
from mvmr.data.batches import BatchMaker
from mvmr.data.module import TrainingData
from mvmr.engine.passes import DataPass
from mvmr.engine.train import Parts, build
from mvmr.methods import MVMR
from mvmr.types import Step

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
    "simclr": {
        "method": {"name": "simclr", "head": "v2", "projector": [32, 32, 16]},
        "views": {"recipe": "simclr", "size": 16},
    },
    # At COMMON's rate the heads' last norms, in so narrow a net, amplify rounding tenfold a step.
    "moco_v3": {
        "method": {"name": "moco_v3", "projector": [32, 16], "predictor": [32, 16], "momentum": 0.9},
        "views": {"recipe": "byol", "size": 16},
        "optimizer": {"lr": 3.0e-4},
    },
    "byol": {
        "method": {"name": "byol", "projector": [32, 16], "predictor_hidden": 32, "momentum": 0.9},
        "views": {"recipe": "byol", "size": 16},
    },
    # The bare loop of the contract tests gives every group the run's curve.
    "simsiam": {
        "method": {"name": "simsiam", "projector": [32, 32], "predictor_hidden": 16, "constant_predictor_lr": False},
        "views": {"recipe": "moco_v2", "size": 16},
    },
    "moco": {
        # Groups of four images; a queue that is no multiple of the batch.
        "method": {"name": "moco", "hidden": 32, "dim": 16, "queue": 40, "momentum": 0.9, "batch_norm_groups": 4},
        "views": {"recipe": "moco_v2", "size": 16},
    },
    "barlow_twins": {
        "method": {"name": "barlow_twins", "projector": [32, 32, 32]},
        "views": {"recipe": "byol", "size": 16},
    },
    "vicreg": {
        "method": {"name": "vicreg", "expander": [32, 32, 32]},
        "views": {"recipe": "byol", "size": 16},
    },
    "swav": {
        # A queue that is no multiple of the batch.
        "method": {"name": "swav", "hidden": 32, "dim": 16, "prototypes": 24, "queue": 40, "queue_epoch": 0},
        "views": {"recipe": "multicrop", "size": 16, "crops": {"local": {"count": 2, "size": 8}}},
        "optimizer": {"lr": 3.0e-4},  # at a higher one so small a net amplifies rounding sixfold a step
    },
    "oss": {
        "method": {
            "name": "oss",
            "teacher": {"name": "resnet18", "stem": "mvmr", "width": 0.25, "zero_init_residual": False},
            "teacher_hidden": 32,
            "student_hidden": 24,
            "dim": 16,
            "prototypes": 24,
            "queue": 40,
            "queue_epoch": 0,
            "classifier_hidden": 16,
        },
        "views": {"recipe": "multicrop", "size": 16, "crops": {"local": {"count": 2, "size": 8}}},
    },
    "dino": {
        "method": {
            "name": "dino",
            "hidden": 32,
            "bottleneck": 16,
            "prototypes": 24,
            "momentum": 0.9,
            "temperature_epochs": 2,
        },
        "views": {"recipe": "dino", "size": 16, "crops": {"local": {"count": 2, "size": 8}}},
    },
    "deepcluster": {
        "method": {"name": "deepcluster", "clusters": 6, "pca_dim": 16, "iterations": 5},
        "views": {"recipe": "mvmr", "size": 16},
    },
    "deepcluster_v2": {
        "method": {"name": "deepcluster_v2", "hidden": 32, "dim": 16, "prototypes": [6, 8], "iterations": 5},
        "views": {"recipe": "multicrop", "size": 16, "crops": {"local": {"count": 2, "size": 8}}},
    },
    "deepercluster": {
        "method": {
            "name": "deepercluster",
            "clusters": 6,
            "super_clusters": 2,
            "pca_dim": 16,
            "iterations": 5,
            "relabel_epochs": 1,
        },
        "views": {"recipe": "mvmr", "size": 16},
    },
    # In no more than the tiny run's steps a few labellings, of one head each.
    "self_label": {
        "method": {
            "name": "self_label",
            "heads": 2,
            "clusters": 6,
            "strength": 5.0,
            "labellings": 5,
            "relabel": "in_turn",
        },
        "views": {"recipe": "mvmr", "size": 16},
    },
    "seed": {
        "method": {"name": "seed", "hidden": 32, "queue": 40},
        "views": {"recipe": "mvmr", "size": 16},
        "representations": {"teacher": {"kind": "hog", "bins": 8, "cell": 4}},
    },
    "compress": {
        "method": {"name": "compress", "queue": 40, "momentum": 0.9},
        "views": {"recipe": "mvmr", "size": 16},
        "representations": {"teacher": {"kind": "hog", "bins": 8, "cell": 4}},
    },
    "crd": {
        "method": {"name": "crd", "dim": 16, "negatives": 20},
        "views": {"recipe": "mvmr", "size": 16},
        "representations": {"teacher": {"kind": "hog", "bins": 8, "cell": 4}},
    },
    "cluster_fit": {
        "method": {"name": "cluster_fit", "clusters": 8, "iterations": 5},
        "views": {"recipe": "mvmr", "size": 16},
        "representations": {"teacher": {"kind": "hog", "bins": 8, "cell": 4}},
    },
    "regression": {
        "method": {"name": "regression", "batch_norm": True},
        "views": {"recipe": "mvmr", "size": 16},
        "representations": {"teacher": {"kind": "hog", "bins": 8, "cell": 4}},
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


class Relabelling:
    """What the engine does before each step, once a step: `before_step`, and dropping the state of what it re-drew."""

    def __init__(self, run: Run, parts: Parts, optimizer: torch.optim.Optimizer, *, rank: int = 0, world_size: int = 1):
        self.method, self.optimizer, self.done = parts.method, optimizer, -1
        over = DataPass(parts.source, run, parts.maker, torch.device("cpu"), rank, world_size)
        self.pass_over = _InPrecision(over, next(parts.method.parameters()).dtype)

    def __call__(self, step: Step) -> torch.Tensor | None:
        if self.done != step.step:
            self.done = step.step
            for parameter in self.method.before_step(step, self.pass_over):
                self.optimizer.state.pop(parameter, None)
        return self.method.sampling_weights()


class _InPrecision:
    """A pass over the data set in the precision of the method's weights."""

    def __init__(self, pass_over: DataPass, dtype: torch.dtype):
        self.pass_over, self.dtype = pass_over, dtype

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pass_over(lambda images: fn(images.to(self.dtype)))

    def representation(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        index, rows = self.pass_over.representation(name)
        return index, rows.to(self.dtype)


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


__all__ = [
    "COMMON",
    "METHODS",
    "Relabelling",
    "in_float64",
    "load",
    "not_finite_at",
    "parts_and_data",
    "tiny",
    "weights",
]
