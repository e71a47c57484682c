"""Training on cached representations: the same gradient on 1 and 2 devices, the same weights after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from commands import losses, trained_on
from killing import finish, kill_at
from mvmr.config import Run
from mvmr.engine.train import Parts, assemble
from mvmr.ops.batch_norm import synchronise_batch_norm
from mvmr.representations.cache import CacheConfig, CacheRequest, cache_representations
from mvmr.types import Step
from ranks import averaged_gradients, run_on_ranks
from tiny import in_float64, parts_and_data, tiny

EXACT = {"enabled": True, "width": None, "dtype": "float32"}


def kept(run: Run, parts: Parts, folder: Path, **more: Any) -> dict[str, Any]:
    request = CacheRequest(
        size=run.views.size, mean=run.data.mean, std=run.data.std, folder=folder, device=torch.device("cpu"), **more
    )
    rows = cache_representations(parts.source, parts.maker.representations, run.cache, request=request)
    return {name: each.rows for name, each in rows.items()}


def gradients(rank: int, world_size: int, folder: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    run = tiny(cache={"width": 64})
    parts, data = parts_and_data(run)
    together = {"rank": rank, "world_size": world_size, "barrier": torch.distributed.barrier} if world_size > 1 else {}
    parts.maker.kept = kept(run, parts, folder, **together)
    method = parts.method.double().train()
    if world_size > 1:
        method = synchronise_batch_norm(method)
    loaded = next(iter(data.loader(rank, world_size)))
    method.loss(in_float64(parts.maker)(loaded), Step(0, 10, 5))["loss"].backward()
    return sorted(parts.maker.kept), averaged_gradients(method, world_size)


def test_gradient_on_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    names, whole = gradients(0, 1, tmp_path / "one")
    assert names == ["hog"]
    for names, found in run_on_ranks(gradients, 2, 2, tmp_path / "two"):
        assert names == ["hog"]
        for key, gradient in whole.items():
            assert (found[key] - gradient).abs().max() <= 1e-9 * max(1.0, gradient.abs().max().item()), key
    one, two = ([file.read_bytes() for file in sorted((tmp_path / name).rglob("shard-*"))] for name in ("one", "two"))
    assert one == two
    assert len(one) == 1


def test_cached_rows_train_as_computed_ones_do(tmp_path: Path) -> None:
    found = []
    for name, cache in (("off", {"enabled": False}), ("on", EXACT)):
        (tmp_path / name).mkdir()
        run = tiny(cache=cache, data__cache=str(tmp_path / "cache"))
        parts, _ = parts_and_data(run)
        trainer, adapter, module = assemble(run, parts, tmp_path / name, quiet=True)
        trainer.fit(adapter, datamodule=module)
        assert sorted(parts.maker.kept) == ([] if name == "off" else ["hog"])
        found.append(
            [json.loads(line)["train/loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        )
    assert len(found[0]) == 12
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_killed_and_resumed_with_a_cache_equals_uninterrupted(tmp_path: Path) -> None:
    run = tiny(cache={"width": 64}, data__cache=str(tmp_path / "cache"), engine={
        "accelerator": "cpu", "log_every_steps": 1, "tensorboard": False, "checkpoint_every_steps": 1})  # fmt: skip
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(run.resolved()))
    finish(config, tmp_path / "whole")
    kill_at(3, config, tmp_path / "killed", signal.SIGKILL)
    finish(config, tmp_path / "killed", "--resume")
    whole, killed = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[key]) for key, value in whole.items())


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    run = tiny(cache={"width": 64}, schedule__epochs=1, data__cache=str(tmp_path / "cache"))
    two, one = (losses(trained_on(devices, run, tmp_path)) for devices in (2, 1))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert len(list((tmp_path / "cache").rglob("shard-*"))) == 1


@pytest.mark.parametrize("switch", [False, "off"])
def test_the_cache_is_switched_off_by_a_word(switch: bool | str) -> None:
    assert tiny(cache=switch).cache == CacheConfig(enabled=False)
    assert tiny(cache="on").cache == CacheConfig()
