"""The two searches: what they find, what they survive, and that nothing is left of them."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvmr.config import Run, load
from mvmr.engine import memory, trials
from mvmr.engine import train as train_module
from mvmr.engine import tune as tune_module
from mvmr.engine.module import Adapter
from mvmr.engine.trials import loss_by_rate, try_batch_size
from mvmr.engine.tune import Tuned, save, suggest, tune
from mvmr.errors import RunError, UserError
from mvmr.methods import MVMR
from tiny import not_finite_at, parts_and_data, weights
from tiny import tiny as usual

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"
RATES = [10 ** (-6 + 6 * i / 99) for i in range(100)]


def tiny(**changes: Any) -> Run:
    """The tiny run with one cheap representation on a hundred small images: searches take many steps."""
    changes = {"representations": {"pixels": {}}, "views__size": 8, **changes}
    return usual(**changes)


def only_batch_size(run: Run, **settings: Any) -> Tuned:
    return tune(run, batch_size=True, lr=False, quiet=True, **settings)


def fail_above(size: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of more than `size` images run out of memory; the sizes that were met."""
    step = Adapter.training_step
    met: list[int] = []

    def limited(self: Adapter, batch: Any, batch_idx: int) -> Any:
        met.append(len(batch.index))
        if len(batch.index) > size:
            raise error
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Adapter, "training_step", limited)
    return met


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """Every trial collects garbage, which is slow over all that the other tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "RATES", 24)


def test_batch_size_doubles_up_to_the_data() -> None:
    tuned = only_batch_size(tiny(optimizer__lr="auto"))
    assert tuned.run.data.batch_size == 64
    record = tuned.record["batch_size"]
    assert [trial["batch_size"] for trial in record["trials"]] == [16, 32, 64]
    assert all(trial["works"] and trial["images_per_second"] > 0 for trial in record["trials"])
    assert record["limit"] == "the data has 96 images"
    assert tuned.run == tiny(optimizer__lr="auto", data__batch_size=64)
    assert tuned.record["remarks"] == []


@pytest.mark.parametrize(("limit", "sizes"), [(32, [16, 32]), (63, [16, 32]), (16, [16]), (12, [8])])
def test_batch_size_stops_at_the_limit(limit: int, sizes: list[int]) -> None:
    tuned = only_batch_size(tiny(optimizer__lr="auto"), max_batch_size=limit)
    record = tuned.record["batch_size"]
    assert [trial["batch_size"] for trial in record["trials"]] == sizes
    assert (record["found"], record["recipe"], record["limit"]) == (sizes[-1], 16, f"--max-batch-size is {limit}")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), torch.OutOfMemoryError(),
     RuntimeError(ALLOCATOR), MemoryError()],
)  # fmt: skip
def test_out_of_memory_ends_in_a_number(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_above(40, error, monkeypatch)
    tuned = only_batch_size(tiny(optimizer__lr="auto"))
    record = tuned.record["batch_size"]
    assert tuned.run.data.batch_size == record["found"] == 32
    assert [(t["batch_size"], t["works"]) for t in record["trials"]] == [(16, True), (32, True), (64, False)]
    assert record["limit"] == "64 runs out of memory"
    assert record["trials"][-1]["images_per_second"] is None


def test_a_first_size_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    met = fail_above(5, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    tuned = only_batch_size(tiny(optimizer__lr="auto"))
    assert tuned.run.data.batch_size == 4
    assert met == [16, 8, 4, 4, 4]
    assert tuned.record["batch_size"]["limit"] == "8 runs out of memory"


def test_no_size_that_fits_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_above(0, MemoryError(), monkeypatch)
    with pytest.raises(RunError, match=r"no batch size fits into memory, not even 2: .*encoder\.name"):
        only_batch_size(tiny())


def test_other_errors_are_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_above(20, RuntimeError("shapes do not match"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        only_batch_size(tiny())
    assert not memory.is_out_of_memory(ValueError("out of memory"))


def test_on_the_cpu_memory_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each image is said to take a megabyte, and 100 are left: 64 would fit, 128 would not, 80 is the share.
    monkeypatch.setattr(trials.PeakMemory, "stop", lambda self: 0)
    monkeypatch.setattr(memory, "resident", lambda: 10_000_000)
    monkeypatch.setattr(memory, "available", lambda: 100_000_000)
    real = try_batch_size

    def measured(run: Run, parts: Any, size: int, **settings: Any) -> trials.Trial:
        trial = real(run, parts, size, **settings)
        return trials.Trial(size, trial.works, 10_000_000 + size * 1_000_000, trial.images_per_second)

    monkeypatch.setattr(tune_module, "try_batch_size", measured)
    run = tiny(optimizer__lr="auto", data={"name": "digits", "limit": 300, "batch_size": 128})
    record = only_batch_size(run).record["batch_size"]
    assert [trial["batch_size"] for trial in record["trials"]] == [16, 32, 64], "from small, though the recipe has 128"
    assert record["limit"] == "128 is expected to take more than 80% of the memory available"


def test_memory_of_a_trial_is_measured() -> None:
    if memory.resident() is None:
        pytest.skip("this system does not tell")
    peak = memory.PeakMemory()
    before = memory.resident() or 0
    peak.start(torch.device("cpu"))
    torch.ones(64 << 20, dtype=torch.uint8).sum()
    highest = peak.stop()
    assert highest is not None
    assert highest >= before + (60 << 20)
    assert peak.stop() is None
    left = memory.available()
    assert left is not None
    assert 0 < left < 1 << 50


@pytest.mark.parametrize(("version", "controllers"), [(1, "cpu,memory"), (2, "")])
def test_limits_of_control_groups_count(
    version: int, controllers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    inner = (groups / "memory" if version == 1 else groups) / "a/b"
    inner.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 999 kB\nMemAvailable:       900000 kB\n")
    (proc / "self/cgroup").write_text(f"7:cpuset:/a\n1:{controllers}:/a/b\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUP", groups)
    assert memory.available() == 900_000 * 1024, "no limit in the groups"
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    for folder, limit, used in ((inner, "max", 30), (inner.parent, 100_000_000, 60_000_000)):
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (inner.parent / "memory.stat").write_text("anon 5\ninactive_file 10000000\n")
    assert memory.available() == 50_000_000, "the limit of the group above, with what the kernel can reclaim"


def test_a_fixed_rate_is_left_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match=r"optimizer\.lr stays 0\.001.*data\.batch_size=16, not 32"):
        tuned = only_batch_size(tiny(), max_batch_size=32)
    assert tuned.run.optimizer.lr == 1e-3
    assert len(tuned.record["remarks"]) == 1


def test_the_suggestion_on_curves_of_known_shape() -> None:
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.standard_normal(100)
    x = np.arange(100)
    # Falls by 1 between steps 40 and 60, and rises from step 80 on.
    curve = 3 - np.clip((x - 40) / 20, 0, 1) + np.where(x > 80, 0.4 * (x - 80), 0)
    found = suggest(RATES, list(curve + noise))
    assert found is not None
    assert RATES[53] <= found <= RATES[59], "at four fifths of the fall"
    dips_later = np.where(x > 95, -5.0, curve)
    assert suggest(RATES, list(dips_later + noise)) == found, "what follows the rise does not count"
    assert suggest(RATES, list(3 + noise)) is None, "flat"
    assert suggest(RATES, list(3 + 0.05 * x + noise)) is None, "only rises"
    assert suggest(RATES, [3.0] * 100) is None
    assert suggest(RATES[:10], list(curve[:10])) is None, "too few"


def test_rates_rise_in_the_proportion_of_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(optimizer={"lr": 1e-3, "layer_decay": 0.5})
    parts, _ = parts_and_data(run)
    seen: list[list[float]] = []

    def note(self: Adapter, optimizer: Any) -> None:
        seen.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]])

    monkeypatch.setattr(Adapter, "on_before_optimizer_step", note)
    losses = loss_by_rate(run, parts, RATES[:20], lambda done: None, quiet=True)
    assert losses is not None
    assert len(losses) == 20, "more steps than the run has: the range test is as long as it needs"
    assert [first for first, _ in seen] == pytest.approx(RATES[:20])
    assert [last / first for first, last in seen] == pytest.approx([0.5**8] * 20)


def test_a_loss_that_is_not_finite_ends_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite_at(9, monkeypatch)
    with pytest.warns(UserWarning, match=r"at no rate .*optimizer\.lr stays 0\.001"):
        tuned = tune(tiny(), batch_size=False, lr=True, quiet=True)
    assert len(tuned.record["lr"]["losses"]) == len(tuned.record["lr"]["rates"]) == 9
    assert (tuned.record["lr"]["found"], tuned.record["lr"]["finite_to_the_end"]) == (None, False)
    assert tuned.run == tiny()


def test_a_loss_that_measures_no_progress_suggests_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "suggest", lambda rates, losses: 0.5)
    monkeypatch.setattr(MVMR, "loss_is_progress", False)
    with pytest.warns(UserWarning, match=r"loss of mvmr is no measure of progress.*stays auto"):
        tuned = tune(tiny(optimizer__lr="auto"), batch_size=False, lr=True, quiet=True)
    assert tuned.run.optimizer.lr == "auto"
    assert len(tuned.record["lr"]["losses"]) == 24


def test_out_of_memory_in_the_range_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "suggest", lambda rates, losses: 0.5)
    fail_above(8, MemoryError(), monkeypatch)
    with pytest.raises(RunError, match=r"data\.batch_size=16 runs out of memory: .*--batch-size"):
        tune(tiny(), batch_size=False, lr=True, quiet=True)
    monkeypatch.setattr(
        tune_module, "try_batch_size", lambda run, parts, size, **_: trials.Trial(size, size <= 16, None, 1.0)
    )
    with pytest.warns(UserWarning, match="half of it is taken"):
        tuned = tune(tiny(), batch_size=True, lr=True, quiet=True)
    assert (tuned.run.data.batch_size, tuned.run.optimizer.lr) == (8, 0.5)
    assert tuned.record["batch_size"]["found"] == tuned.record["lr"]["batch_size"] == 8


@pytest.mark.parametrize("settings", [{"devices": 2}, {"nodes": 2, "devices": 1}])
def test_several_devices_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"works on one: tune with engine\.devices=1"):
        tune(tiny(engine={"accelerator": "cpu", **settings}), batch_size=True, lr=True)
    with pytest.raises(UserError, match=r"--max-batch-size 1"):
        only_batch_size(tiny(), max_batch_size=1)


def test_both_searches_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, every global generator, the working folder: before equals after, also when a search fails."""
    monkeypatch.chdir(tmp_path)
    run = tiny()
    parts, _ = parts_and_data(run)
    before = weights(parts.method)
    monkeypatch.setattr(tune_module, "build", lambda run, **_: parts)
    monkeypatch.setattr(tune_module, "suggest", lambda rates, losses: 0.5)
    monkeypatch.setattr(tune_module, "RATES", 7)

    def generators() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    state = generators()
    tuned = tune(run, batch_size=True, lr=True, max_batch_size=32, quiet=True)
    fail_above(0, MemoryError(), monkeypatch)
    with pytest.raises(RunError):
        only_batch_size(run)
    assert generators() == state
    assert all(value.equal(before[name]) for name, value in weights(parts.method).items())
    assert all(parameter.grad is None for parameter in parts.method.parameters())
    assert list(tmp_path.iterdir()) == []
    assert (tuned.run.data.batch_size, tuned.run.optimizer.lr) == (32, 0.5)
    assert run == tiny()


def test_the_written_recipe_is_read_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "suggest", lambda rates, losses: 0.00042)
    tuned = tune(tiny(schedule__epochs=1), batch_size=True, lr=True, max_batch_size=48, quiet=True)
    file = tmp_path / "new/found.yaml"
    curves = save(tuned, file)
    assert curves == tmp_path / "new/found.json"
    assert json.loads(curves.read_text()) == json.loads(json.dumps(tuned.record))
    assert sorted(path.name for path in file.parent.iterdir()) == ["found.json", "found.yaml"]
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert "# data.batch_size: 32 fits (--max-batch-size is 48); the recipe had 16" in header
    assert any(line.startswith("# optimizer.lr: 0.00042, ") for line in header)
    run = load(file)
    assert run == tuned.run == tiny(schedule__epochs=1, data__batch_size=32, optimizer__lr=0.00042)
    out = train_module.train(run, tmp_path / "run", quiet=True)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    with pytest.raises(UserError, match=r"found\.txt.*\.yaml"):
        save(tuned, tmp_path / "found.txt")


@pytest.mark.gpu
def test_memory_of_a_gpu_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real exhaustion: the process may take little more than is in use."""
    limit = 600 << 20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        run = tiny(
            optimizer__lr="auto", engine={"accelerator": "gpu", "devices": 1, "precision": "32", "tensorboard": False},
            data={"name": "digits", "batch_size": 16}, encoder={"name": "resnet18", "stem": "cifar"},
        )  # fmt: skip
        record = only_batch_size(run).record["batch_size"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert record["limit"].endswith("runs out of memory")
    peaks = [trial["peak_bytes"] for trial in record["trials"] if trial["works"]]
    assert peaks == sorted(peaks)
    assert all(0 < peak <= limit for peak in peaks)
    assert torch.cuda.memory_allocated() < limit / 4, "nothing is held after the search"
