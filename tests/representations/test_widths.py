"""The widths that a run finds out are those of its batches, cached or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.config import Run
from mvmr.engine.train import Parts, assemble, build
from mvmr.representations import Representation
from mvmr.representations.cache import CacheConfig
from mvmr.representations.widths import width_in_batches
from tiny import tiny

CPU = torch.device("cpu")

KINDS: dict[str, Any] = {
    "vit": {"kind": "teacher", "model": "timm:test_vit@random"},
    "pixels": {},
    "augmented_pixels": {},
    "hog": {"bins": 8, "cell": 4},
    "scattering": {},
}


def width_of(name: str, run: Run, parts: Parts, device: torch.device = CPU) -> int:
    return width_in_batches(parts.maker.representations, run.cache, name, size=run.views.size, device=device)


@pytest.mark.parametrize("width", [None, 100])
@pytest.mark.parametrize("enabled", [True, False])
def test_widths_are_those_of_a_batch(enabled: bool, width: int | None, tmp_path: Path) -> None:
    cache = {"enabled": enabled, "width": width}
    run = tiny(representations=KINDS, cache=cache, data__cache=str(tmp_path / "cache"), data__limit=32)
    parts = build(run)
    found = {name: width_of(name, run, parts) for name in KINDS}
    _, _, data = assemble(run, parts, tmp_path, quiet=True)
    data.weights = None  # no engine runs here
    assert data.prepare is not None
    data.prepare()
    rows = parts.maker(next(iter(data.loader()))).representations
    assert found == {name: value.shape[1] for name, value in rows.items()}
    assert (found["hog"] == 100) == (enabled and width == 100), "narrowed by the cache alone"
    assert (found["pixels"], found["vit"]) == (3 * 16 * 16, 64)


def test_a_function_is_measured_too(tmp_path: Path) -> None:
    run = tiny(representations={"mine": {"kind": "teacher", "model": "python"}})
    parts = build(run, teachers={"mine": lambda images: images.mean((2, 3))})
    assert width_of("mine", run, parts) == 3


class StandIn(Representation):
    """A teacher somewhere, that remembers where images were when it was asked."""

    learned = True

    def __init__(self, device: str, *, kept: bool):
        super().__init__()
        self.seen: list[str] = []
        weights = torch.ones(3, device=device)
        if kept:
            self.weights = nn.Parameter(weights)
        else:  # closed over, as a function from Python does
            self.hidden = [weights]

    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        self.seen.append(images.device.type)
        return images.mean((2, 3)) * (self.weights if hasattr(self, "weights") else self.hidden[0])


@pytest.mark.parametrize(
    ("kept", "run", "there"), [(True, "cpu", "meta"), (True, "meta", "cpu"), (False, "meta", "meta")]
)
def test_a_teacher_is_asked_where_its_weights_are(kept: bool, run: str, there: str) -> None:
    """The device of nothing, "meta", plays a GPU. Where weights are out of sight, the run's device is taken."""
    teacher = StandIn(there, kept=kept)
    modules = nn.ModuleDict({"teacher": teacher, "other": StandIn("cpu", kept=True)})
    assert width_in_batches(modules, CacheConfig(), "teacher", size=16, device=torch.device(run)) == 3
    assert teacher.seen == [there]
    assert modules["other"].seen == []
    assert all(parameter.device.type == there for parameter in teacher.parameters()), "not moved"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.weights


@pytest.mark.gpu
@pytest.mark.parametrize("function", [True, False])
def test_teachers_on_a_gpu_teach_there(function: bool, tmp_path: Path) -> None:
    net = Scaled().cuda()
    given = {"teacher": (lambda images: net(images)) if function else net}
    python = {"kind": "teacher", "model": "python"}
    engine = {"accelerator": "gpu", "devices": 1, "tensorboard": False}
    run = tiny("regression", representations={"teacher": python}, schedule__epochs=1, engine=engine)
    parts = build(run, teachers=given)
    assert parts.method.config.width == 3
    trainer, adapter, data = assemble(run, parts, tmp_path, quiet=True)
    trainer.fit(adapter, datamodule=data)
    assert trainer.global_step == 6


def test_the_project_s_own_maps_are_measured_where_they_are() -> None:
    run = tiny(representations={"hog": {"bins": 8, "cell": 4}, "scattering": {}})
    parts = build(run)
    assert width_of("hog", run, parts, torch.device("meta")) == width_of("hog", run, parts)
    assert width_of("scattering", run, parts, torch.device("meta")) == width_of("scattering", run, parts)


@pytest.mark.parametrize(
    ("method", "calls"), [("seed", 1), ("compress", 1), ("crd", 1), ("regression", 1), ("cluster_fit", 0), ("mvmr", 0)]
)
def test_only_the_teacher_is_measured_and_only_where_a_layer_has_its_width(method: str, calls: int) -> None:
    asked = []

    def named(name: str) -> Any:
        def teacher(images: Tensor) -> Tensor:
            asked.append(name)
            return images.mean((2, 3))

        return teacher

    python = {"kind": "teacher", "model": "python"}
    run = tiny(method, representations={"other": python, "teacher": python})
    build(run, teachers={name: named(name) for name in ("other", "teacher")})
    assert asked == ["teacher"] * calls
