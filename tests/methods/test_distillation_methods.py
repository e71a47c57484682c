"""What methods that learn from one frozen teacher have in common: which teacher, how wide, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

import mvmr
from mvmr.config import parse
from mvmr.engine.train import assemble, build, train
from mvmr.errors import UserError
from mvmr.methods import METHODS
from mvmr.methods.base import DistillationConfig
from mvmr.types import Step
from tiny import METHODS as TINY
from tiny import Relabelling, parts_and_data, tiny

TAUGHT = sorted(name for name, method in METHODS.items() if issubclass(method.Config, DistillationConfig))

every_one = pytest.mark.parametrize("name", TAUGHT)


def settings(name: str, **changes: Any) -> dict[str, Any]:
    resolved = tiny(name).resolved()
    return {**resolved, **changes}


def test_they_are_the_baselines() -> None:
    assert TAUGHT == ["cluster_fit", "compress", "crd", "regression", "seed"]


@every_one
def test_a_teacher_that_is_not_there_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.teacher is 'teacher', and `representations` has nothing: add repr"):
        parse(settings(name, representations={}))
    with pytest.raises(UserError, match=r"has hog: add representations\.teacher \(`kind: teacher` and a `model`\), or"):
        parse(settings(name, representations={"hog": {"bins": 8, "cell": 4}}))


@every_one
def test_the_teacher_s_width_is_found_out_and_not_written_down(name: str) -> None:
    of_mine = {**TINY[name]["method"], "teacher": "mine"}
    run = tiny(name, method=of_mine, representations={"mine": {"kind": "hog", "bins": 4, "cell": 4}})
    assert "teacher_width" not in run.resolved()["method"]
    method = build(run).method
    if name == "cluster_fit":  # which looks at the embeddings when it clusters them, and has no layer of their width
        assert run.method.fitted(not_to_be_called) is run.method
        return
    assert method.config.width == 192
    with pytest.raises(ValueError, match=r"needs the width of its teacher"):
        METHODS[name](torch.nn.Identity(), 8, run.method)
    with pytest.raises(UserError, match=r"method\.teacher_width=3: the teacher's is 192"):
        run.method.model_copy(update={"teacher_width": 3}).fitted({"mine": 192}.__getitem__)


def not_to_be_called(name: str) -> int:
    raise AssertionError(f"nobody needs the width of {name}")


@every_one
def test_a_cached_projection_has_its_own_width(name: str, tmp_path: Path) -> None:
    run = tiny(name, cache={"width": 16}, data__cache=str(tmp_path / "cache"))
    parts = build(run)
    assert name == "cluster_fit" or parts.method.config.width == 16
    _, _, data = assemble(run, parts, tmp_path, quiet=True)
    data.weights = None  # no engine runs here
    assert data.prepare is not None
    data.prepare()
    assert parts.method.loss(parts.maker(next(iter(data.loader()))), Step(0, 10, 5))["loss"].isfinite()


@every_one
def test_other_representations_are_remarked_upon(name: str) -> None:
    config = tiny(name).method
    remarks = config.remarks({"global": 2}, ["teacher", "hog"])
    assert any("global" in remark for remark in remarks)
    assert f"{name} learns from teacher alone and does not look at hog" in remarks
    assert config.remarks({"global": 1}, ["teacher"]) == []


@every_one
def test_the_student_sees_one_augmented_view_and_the_teacher_no_gradient(name: str) -> None:
    parts, data = parts_and_data(tiny(name))
    batch = parts.maker(next(iter(data.loader())))
    rows = batch.representations["teacher"].requires_grad_()
    del batch.views["plain"]
    parts.method.loss(batch, Step(0, 10, 5))["loss"].backward()
    if name != "crd":  # whose linear map of the teacher's embedding is trained: the teacher is before it
        assert rows.grad is None


def test_one_cache_serves_every_method(tmp_path: Path) -> None:
    folder = tmp_path / "one-cache"
    changes = {
        "representations": {"teacher": {"kind": "teacher", "model": "timm:test_vit@random"}}, "cache": "on",
        "schedule__epochs": 1, "data__cache": str(folder),
    }  # fmt: skip
    first: dict[Path, tuple[int, bytes]] = {}
    for name in ("mvmr", *TAUGHT):
        run, out = tiny(name, **changes), tmp_path / name
        out.mkdir()
        parts = build(run)
        trainer, adapter, data = assemble(run, parts, out, quiet=True)
        trainer.fit(adapter, datamodule=data)
        assert sorted(parts.maker.kept) == ["teacher"], name
        shards = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("shard-*")}
        assert len({shard.parent for shard in shards}) == 1, "the same rows for all"
        first = first or shards
        assert shards == first, f"{name} has written them again"
        teacher = {parameter.data_ptr() for parameter in parts.maker.representations.parameters()}
        assert not teacher & {parameter.data_ptr() for parameter in adapter.parameters()}
        assert not any("vit" in key or "representations" in key for key in adapter.state_dict())


class Colours(nn.Module):
    """Mean colours, as a module from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * functional.adaptive_avg_pool2d(images, 2)  # [B, 3, 2, 2], of which the mean is taken


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, whose encoder has 64 features."""
    return train(tiny("simclr", schedule__epochs=1), tmp_path_factory.mktemp("teacher") / "run", quiet=True)


@pytest.mark.parametrize(("kind", "width"), [("module", 3), ("run", 64), ("features", 64)])
@every_one
def test_any_kind_of_teacher_will_do(name: str, kind: str, width: int, finished: Path, tmp_path: Path) -> None:
    settings = {
        "module": {"model": "python"},
        "run": {"model": str(finished)},
        "features": {"model": "timm:test_vit@random", "output": "features"},
    }[kind]
    cached = {"cache": "on", "data__cache": str(tmp_path / "cache")}
    run = tiny(name, representations={"teacher": {"kind": "teacher", **settings}}, **cached)
    parts = build(run, teachers={"teacher": Colours()} if kind == "module" else None)
    assert name == "cluster_fit" or parts.method.config.width == width
    _, _, data = assemble(run, parts, tmp_path, quiet=True)
    data.weights = None  # no engine runs here
    assert data.prepare is not None
    data.prepare()
    optimizer = torch.optim.SGD(parts.method.parameters(), lr=0.1)
    Relabelling(run, parts, optimizer)(Step(0, 10, 5))
    batch = parts.maker(next(iter(data.loader())))
    assert batch.representations["teacher"].shape == (16, width)
    assert parts.method.train().loss(batch, Step(0, 10, 5))["loss"].isfinite()


def test_a_teacher_from_python(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    written = settings("regression", schedule={"epochs": 1, "warmup_epochs": 0}, representations={})
    recipe.write_text(yaml.safe_dump(written))
    given = {"teacher": lambda images: images.mean((2, 3))}
    folder = mvmr.train(recipe, out=tmp_path / "run", quiet=True, teachers=given)
    assert (folder / "encoder.safetensors").exists()
