"""Teachers in a run: looked up, never trained, never part of what is saved, whatever they are given as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import mvmr
from mvmr.config import Run
from mvmr.engine.train import assemble, build
from mvmr.errors import UserError
from tiny import tiny

TEACHERS = {
    "vit": {"kind": "teacher", "model": "timm:test_vit@random"},
    "map": {"kind": "teacher", "model": "timm:test_resnet@random", "output": "features", "image_size": 64},
    "hog": {"bins": 8, "cell": 4},
}


def distilling(tmp_path: Path, **changes: Any) -> Run:
    return tiny(representations=TEACHERS, cache="on", data__cache=str(tmp_path / "cache"), **changes)


def test_a_teacher_is_looked_up_and_belongs_to_nothing_that_is_trained(tmp_path: Path) -> None:
    run = distilling(tmp_path, schedule__epochs=1, method__beta={"vit": 2.0})
    parts = build(run)
    teachers = [parts.maker.representations[name] for name in ("vit", "map")]
    before = [{key: value.clone() for key, value in teacher.state_dict().items()} for teacher in teachers]
    trainer, adapter, data = assemble(run, parts, tmp_path, quiet=True)
    trainer.fit(adapter, datamodule=data)
    assert sorted(parts.maker.kept) == ["hog", "map", "vit"]

    held = {parameter.data_ptr() for teacher in teachers for parameter in teacher.parameters()}
    assert held
    assert not held & {parameter.data_ptr() for parameter in adapter.parameters()}
    groups = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert not held & {parameter.data_ptr() for parameter in groups}
    assert not any("vit" in key or "map" in key for key in adapter.state_dict())
    for teacher, weights in zip(teachers, before, strict=True):
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())


def test_cached_embeddings_are_those_of_the_teacher(tmp_path: Path) -> None:
    run = distilling(tmp_path)
    run = run.model_copy(update={"cache": run.cache.model_copy(update={"dtype": "float32"})})
    parts = build(run)
    _, _, data = assemble(run, parts, tmp_path, quiet=True)
    data.weights = None  # no engine runs here
    loaded = next(iter(data.loader()))
    computed = parts.maker(loaded).representations
    assert data.prepare is not None
    data.prepare()
    looked_up = parts.maker(loaded).representations
    assert list(looked_up) == list(computed) == list(TEACHERS)
    for name, rows in computed.items():
        torch.testing.assert_close(looked_up[name], rows, rtol=1e-4, atol=1e-5)


class Colours(nn.Module):
    """Mean colour of each quarter: a teacher that nobody trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(images, 2)


def test_teachers_from_python_join_a_recipe_and_are_asked_for_again(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(distilling(tmp_path, schedule__epochs=1).resolved()))
    module = Colours()
    given = {"colours": module, "brightness": lambda images: images.mean((1, 2, 3))[:, None]}
    folder = mvmr.train(recipe, out=tmp_path / "run", quiet=True, teachers=given)
    assert module.training, "what is given is copied, not changed"
    written = yaml.safe_load((folder / "config.yaml").read_text())["representations"]
    assert written["colours"]["model"] == written["brightness"]["model"] == "python"
    assert (folder / "encoder.safetensors").exists()
    with pytest.raises(UserError, match=r"representations\.colours.*given from Python"):
        mvmr.train(folder / "config.yaml", out=tmp_path / "again", quiet=True)
    mvmr.train(folder / "config.yaml", out=tmp_path / "again", quiet=True, teachers=given)


def test_a_run_folder_teaches_a_smaller_student(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(yaml.safe_dump(tiny(schedule__epochs=1).resolved()))
    folder = mvmr.train(teacher, out=tmp_path / "teacher", quiet=True)
    run = distilling(tmp_path, schedule__epochs=1).resolved()
    run["representations"] = {"teacher": {"model": str(folder)}}
    student = tmp_path / "student.yaml"
    student.write_text(yaml.safe_dump(run))
    assert (mvmr.train(student, out=tmp_path / "student", quiet=True) / "encoder.safetensors").exists()


def test_a_wrong_teacher_stops_before_there_is_a_run_folder(tmp_path: Path) -> None:
    run = distilling(tmp_path).resolved()
    run["representations"] = {"teacher": {"model": "timm:no_such_model"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run))
    with pytest.raises(UserError, match=r"representations\.teacher.*no_such_model"):
        mvmr.train(recipe, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
