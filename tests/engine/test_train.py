"""What a run does when something goes wrong, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.api import evaluate
from mvmr.config import load
from mvmr.engine import train as train_module
from mvmr.engine.checkpoints import Checkpoints
from mvmr.engine.metrics import MetricsFile
from mvmr.engine.train import assemble, build, train
from mvmr.errors import RunError, UserError
from mvmr.methods import MVMR
from tiny import not_finite_at, parts_and_data, tiny, weights


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_holds_what_the_contract_says(tmp_path: Path) -> None:
    run = tiny(online__every_epochs=1, online__knn_every_epochs=1, online__images=64, online__knn_images=64)
    out = train(run, tmp_path / "run", quiet=True)
    assert load(out / "config.yaml") == run
    environment = json.loads((out / "environment.json").read_text())
    assert environment["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (out / "checkpoints/last.ckpt").exists()
    assert (out / "encoder.safetensors").exists()
    lines = lines_of(out)
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert {"epoch", "seconds", "images_per_second", "lr", "train/invariance", "train/dcor/hog"} <= set(training[0])
    watched = [line for line in lines if "rankme" in line]
    assert len(watched) == 2
    names = {"embedding_std", "dependence/pixels", "dependence/hog", "dependence/augmented_pixels", "knn/top1"}
    assert names <= set(watched[0])
    assert all(0 < line["knn/top1"] <= 100 for line in watched)


def test_the_online_head_is_kept_and_evaluated_later(tmp_path: Path) -> None:
    run = tiny(online__knn_every_epochs=1, data__limit=None, schedule__epochs=1)
    out = train(run, tmp_path / "run", quiet=True)
    (logged,) = (line for line in lines_of(out) if "head/top1" in line)
    (result,) = evaluate(out, on=["head"])
    assert result.metrics["top1"] == pytest.approx(logged["head/top1"], abs=0.21)  # one of the 500 test images
    assert result.metrics["top5"] > result.metrics["top1"] > 30
    without = train(run.model_copy(update={"online": run.online.model_copy(update={"head": False})}), tmp_path / "no")
    assert not (without / "head.safetensors").exists()
    with pytest.raises(UserError, match=r"head\.safetensors"):
        evaluate(without, on=["head"])


def test_watching_changes_no_weight(tmp_path: Path) -> None:
    bare = train(tiny(), tmp_path / "bare", quiet=True)
    watched = tiny(online__every_epochs=1, online__knn_every_epochs=1, online__images=64, online__knn_images=64)
    other = train(watched, tmp_path / "watched", quiet=True)
    assert (bare / "encoder.safetensors").read_bytes() == (other / "encoder.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite_at(7, monkeypatch)
    with pytest.raises(RunError, match=r"step 7: loss is nan.*optimizer\.lr"):
        train(tiny(), tmp_path / "run", quiet=True)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert all(torch.isfinite(v).all() for v in saved["state_dict"].values() if v.is_floating_point())


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Checkpoints._save
    calls = []

    def full(self: Checkpoints, trainer: Any, name: str) -> None:
        calls.append(name)
        if len(calls) == 2:

            def refuse(*_: Any) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr("mvmr.engine.checkpoints.os.fsync", refuse)
        write(self, trainer, name)

    monkeypatch.setattr(Checkpoints, "_save", full)
    with pytest.raises(RunError, match=r"last\.ckpt: cannot be written \(No space left on device\).*--resume"):
        train(tiny(), tmp_path / "run", quiet=True)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["last.ckpt"]


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    out = train(tiny(schedule__epochs=1), tmp_path / "run", quiet=True)
    before = (out / "encoder.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        train(tiny(), out, quiet=True)
    with pytest.raises(UserError, match=r"optimizer\.lr.*start anew"):
        train(tiny(schedule__epochs=1, optimizer__lr=0.5), out, resume=True, quiet=True)
    for key, value in (("engine__accumulate", 2), ("views__size", 8), ("data__batch_size", 8)):
        with pytest.raises(UserError, match=key.replace("__", r"\.")):
            train(tiny(schedule__epochs=1, **{key: value}), out, resume=True, quiet=True)
    with pytest.raises(UserError, match="holds no run to resume"):
        train(tiny(), tmp_path / "other", resume=True, quiet=True)
    assert (out / "encoder.safetensors").read_bytes() == before


def test_resume_refuses_other_images_and_allows_other_watching(tmp_path: Path) -> None:
    run = tiny(data={"name": "images", "root": str(tmp_path / "a"), "batch_size": 16, "cache": str(tmp_path / "cache")})
    for folder, count in (("a", 40), ("b", 33)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / folder / f"{i}.png")
    out = train(run, tmp_path / "run", quiet=True)
    watched = run.model_copy(update={"online": run.online.model_copy(update={"images": 8})})
    train(watched, out, resume=True, quiet=True)
    moved = run.model_copy(update={"data": run.data.model_copy(update={"root": tmp_path / "b"})})
    with pytest.raises(UserError, match=r"started on 40 images.*now has 33"):
        train(moved, out, resume=True, quiet=True)


def test_resume_takes_a_run_from_before_a_setting_existed(tmp_path: Path) -> None:
    import yaml

    out = train(tiny(schedule__epochs=1), tmp_path / "run", quiet=True)
    written = yaml.safe_load((out / "config.yaml").read_text())
    del written["optimizer"]["lars_clip"], written["engine"]["clip_each"]
    (out / "config.yaml").write_text(yaml.safe_dump(written))
    assert train(tiny(schedule__epochs=1), out, resume=True, quiet=True) == out


def test_an_automatic_rate_for_another_optimiser_is_said(tmp_path: Path) -> None:
    run = tiny("byol", optimizer={"name": "adam", "lr": "auto"}, schedule__epochs=1)
    with pytest.warns(UserWarning, match=r"optimizer\.lr is auto: 0\.0125, which byol has for lars.*=adam"):
        train(run, tmp_path / "run", quiet=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    out = train(tiny(), tmp_path / "run", quiet=True)
    encoder, metrics = (out / "encoder.safetensors").read_bytes(), (out / "metrics.jsonl").read_text()
    train(tiny(), out, resume=True, quiet=True)
    assert (out / "encoder.safetensors").read_bytes() == encoder
    assert (out / "metrics.jsonl").read_text() == metrics


def test_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    run = tiny(engine__accumulate=2, schedule__epochs=4)
    with pytest.warns(UserWarning, match="accumulate enlarges neither"):
        out = train(run, tmp_path / "run", quiet=True)
    rates = [line["lr"] for line in lines_of(out) if "lr" in line]
    assert len(rates) == 12  # six batches, three optimiser steps an epoch
    assert max(rates) == pytest.approx(run.peak_lr)
    assert rates[-1] == pytest.approx(0.01 * run.peak_lr, rel=1e-3), "the cosine ends with the run"


def test_a_run_without_representations_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="trains on its views alone"):
        train(tiny(representations={}, schedule__epochs=1), tmp_path / "run", quiet=True)


def test_collapse_is_said_once(tmp_path: Path) -> None:
    """Weight decay that halves every weight at each step leaves nothing of the encoder, and the run says so."""
    run = tiny(
        optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 5.0, "decay_biases_and_norms": True},
        online__every_epochs=1, online__images=64, schedule__epochs=4,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(run, tmp_path / "run", quiet=True)
    said = [str(w.message) for w in caught if "collapse" in str(w.message)]
    assert len(said) == 1, said


def test_metrics_file_drops_later_and_broken_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        file.write({"step": step, "x": 1 / 3})
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "x"')
    file.keep_until(2)
    assert lines_of(tmp_path) == [{"step": 1, "x": 0.333333}, {"step": 2, "x": 0.333333}]


def test_a_full_disk_keeps_the_metrics_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path, tensorboard=False)
    for step in (1, 2):
        file.write({"step": step, "x": 1.0})
    before = file.path.read_text()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mvmr.ops.files.os.fsync", refuse)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(No space left on device\).*--resume"):
        file.keep_until(1)
    assert file.path.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(tiny(engine__tensorboard=True, schedule__epochs=1), tmp_path / "run", quiet=True)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    written = [line["train/loss"] for line in lines_of(out)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(written, rel=1e-5)


def test_same_seed_same_weights_other_seed_others() -> None:
    first, again, other = (weights(build(tiny(seed=seed)).method) for seed in (0, 0, 1))
    assert all(value.equal(again[key]) for key, value in first.items())
    assert any(not value.equal(other[key]) for key, value in first.items())


def test_precision_auto_is_float32_without_a_gpu() -> None:
    assert train_module._precision("auto", gpu=False) == "32-true"


def test_gpu_asked_for_but_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"engine\.accelerator"):
        train(tiny(engine__accelerator="gpu"), tmp_path / "run", quiet=True)


class WithHooks(MVMR):
    """MV-MR that notes when the engine calls its hooks, and re-draws its last layer at every epoch's start."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_buffer("labels", torch.zeros(96))
        self.calls: list[tuple[str, int]] = []
        self.asked = 0

    def before_step(self, step: Any, pass_over: Any) -> Any:
        self.calls.append(("before", step.step))
        if not step.starts_epoch:
            return ()
        index, features = pass_over(self.encoder)
        assert features.shape == (96, self.projector[0].in_features)
        assert torch.equal(index.sort().values, torch.arange(96))
        self.labels[:] = step.epoch + 1
        return [self.projector[-1].weight]

    def after_backward(self, step: Any) -> None:
        self.calls.append(("backward", step.step))
        self.projector[0].weight.grad = None  # frozen: momentum and weight decay skip it too

    def after_step(self, step: Any) -> None:
        self.calls.append(("after", step.step))

    def sampling_weights(self) -> torch.Tensor:
        self.asked += 1
        assert (self.labels > 0).all(), "weights are read after the labels are set"
        weights = torch.zeros(96)
        weights[: 10 * int(self.labels[0])] = 1
        return weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_are_called_by_optimiser_step(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(engine__accumulate=accumulate, data__limit=96)
    parts, _ = parts_and_data(run)
    old = parts.method
    method = WithHooks(old.encoder, old.projector[0].in_features, run.method)
    frozen = method.projector[0].weight.detach().clone()
    parts = train_module.Parts(method, parts.source, parts.maker, parts.card)
    trainer, adapter, data = assemble(run, parts, tmp_path, quiet=True)
    seen: list[int] = []
    make = parts.maker.__call__
    monkeypatch.setattr(
        type(parts.maker),
        "__call__",
        lambda self, loaded, device="cpu": (seen.extend(loaded.index.tolist()), make(loaded, device))[1],
    )
    trainer.fit(adapter, datamodule=data)
    steps = 12 // accumulate
    for kind in ("before", "backward", "after"):
        assert [step for name, step in method.calls if name == kind] == list(range(steps)), kind
    assert method.asked == 2, "once an epoch"
    assert set(seen[:96]) <= set(range(10)), "the first epoch draws from the first epoch's weights"
    assert set(seen[96:]) <= set(range(20))
    assert max(seen[96:]) >= 10
    assert torch.equal(method.projector[0].weight, frozen)
