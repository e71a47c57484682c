"""What every method must do, whatever it is."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

import pytest
import torch

from mvmr.cli.listing import entries
from mvmr.config import load, recipe_names
from mvmr.engine.optim import build_optimizer
from mvmr.engine.train import assemble
from mvmr.methods import METHODS
from mvmr.ops.random import step_seed
from mvmr.ops.schedules import warmup_cosine
from mvmr.types import Step
from tiny import METHODS as TINY
from tiny import Relabelling, in_float64, parts_and_data, tiny, weights

ROOT = Path(__file__).resolve().parents[2]

every_method = pytest.mark.parametrize("name", sorted(METHODS))


def test_methods_files_recipes_and_pages_name_the_same_set() -> None:
    names = set(METHODS)
    assert set(TINY) == names
    files = {path.stem for path in (ROOT / "src/mvmr/methods").glob("*.py")} - {"__init__", "base"}
    assert files == names
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} == names
    assert {load(recipe).method.name for recipe in recipe_names()} == names


def test_the_docs_index_says_of_every_method_what_the_list_says() -> None:
    index = (ROOT / "docs/index.md").read_text().splitlines()
    rows = [line for line in index if line.startswith("| [") and "](methods/" in line and line.count("|") == 4]
    expected = []
    for name, summary in entries("methods").items():
        title = (ROOT / f"docs/methods/{name}.md").read_text().splitlines()[0].removeprefix("# ")
        expected.append(f"| [{title}](methods/{name}.md) | `{name}` | {summary} |")
        assert len(summary) < 100
    assert rows == expected


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipe_survives_being_written_and_read(recipe: str, tmp_path: Path) -> None:
    import yaml

    run = load(recipe)
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(run.resolved(), sort_keys=False))
    assert load(written) == run
    first = (resources.files("mvmr.recipes") / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first.startswith("# "), "a recipe starts with what it is"


@every_method
def test_loss_is_finite_and_reaches_every_parameter(name: str) -> None:
    parts, data = parts_and_data(tiny(name))
    terms = parts.method.loss(parts.maker(next(iter(data.loader()))), Step(0, 10, 5))
    assert all(torch.isfinite(value).all() for value in terms.values())
    assert all(not value.requires_grad for key, value in terms.items() if key != "loss")
    terms["loss"].backward()
    for key, parameter in parts.method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), key
    moved = [p.grad.abs().sum() > 0 for p in parts.method.parameters() if p.grad is not None]
    assert sum(moved) > 0.9 * len(moved)


@every_method
def test_objective_changes_nothing_but_batch_norm(name: str) -> None:
    """A loss may be asked for and thrown away: queues, centres and averages move in `after_step` alone."""
    parts, data = parts_and_data(tiny(name))
    batch = parts.maker(next(iter(data.loader())))
    before = weights(parts.method)
    parts.method.loss(batch, Step(0, 10, 5))
    after = weights(parts.method)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key for key in changed if key.rpartition(".")[2] not in statistics} == set()


@every_method
def test_bfloat16_autocast_runs(name: str) -> None:
    parts, data = parts_and_data(tiny(name))
    batch = parts.maker(next(iter(data.loader())))
    torch.manual_seed(0)
    exact = parts.method.loss(batch, Step(0, 10, 5))["loss"]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = parts.method.loss(batch, Step(0, 10, 5))["loss"]
    rough.backward()
    assert rough.item() == pytest.approx(exact.item(), rel=0.05, abs=0.02)


@every_method
def test_trainer_equals_a_bare_loop_bit_for_bit(name: str, tmp_path: Path) -> None:
    """The insurance against the engine: Lightning may go, the methods stay."""
    run = tiny(name)

    parts, data = parts_and_data(run)
    optimizer = build_optimizer(parts.method.parameter_groups(), run.optimizer, run.peak_lr)
    relabel = Relabelling(run, parts, optimizer)
    data.weights = lambda: relabel(step)
    loader = data.loader()
    steps = len(loader)
    step = Step(0, steps * run.schedule.epochs, steps)
    base = [group["lr"] for group in optimizer.param_groups]
    parts.method.train()
    for epoch in range(run.schedule.epochs):
        loader.set_epoch(epoch)
        for loaded in loader:
            scale = warmup_cosine(
                step.step, total_steps=step.total_steps, warmup_steps=round(run.schedule.warmup_epochs * steps),
                start=run.schedule.start, final=run.schedule.final,
            )  # fmt: skip
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr if group.get("constant_lr") else lr * scale
            optimizer.zero_grad()
            relabel(step)
            torch.manual_seed(step_seed(run.seed, step.step, 0))
            parts.method.loss(parts.maker(loaded), step)["loss"].backward()
            parts.method.after_backward(step)
            optimizer.step()
            parts.method.after_step(step)
            step = Step(step.step + 1, step.total_steps, steps)

    again, _ = parts_and_data(run)
    trainer, adapter, module = assemble(run, again, tmp_path, quiet=True)
    trainer.fit(adapter, datamodule=module)
    assert trainer.global_step == step.step
    mine, theirs = weights(parts.method), weights(adapter.method)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def losses_of_twenty_steps(name: str) -> list[float]:
    # float64 and a low rate: at a high one so small a net amplifies rounding, of which CPUs differ, tenfold a step.
    run = tiny(name, schedule__epochs=4, optimizer={"name": "adam", "lr": 1e-4})
    parts, data = parts_and_data(run)
    method, maker = parts.method.double().train(), in_float64(parts.maker)
    optimizer = build_optimizer(method.parameter_groups(), run.optimizer, run.peak_lr)
    relabel = Relabelling(run, parts, optimizer)
    data.weights = lambda: relabel(Step(len(losses), 20, len(loader)))
    loader, losses = data.loader(), []
    while len(losses) < 20:
        for loaded in loader:
            step = Step(len(losses), 20, len(loader))
            optimizer.zero_grad()
            relabel(step)
            torch.manual_seed(step.step)
            loss = method.loss(maker(loaded), step)["loss"]
            loss.backward()
            method.after_backward(step)
            optimizer.step()
            method.after_step(step)
            losses.append(loss.item())
    return losses[:20]


@every_method
def test_losses_of_twenty_steps_are_as_written_down(name: str) -> None:
    """Golden values, compared to a relative 1e-4: a refactoring must reproduce them."""
    golden = Path(__file__).with_name("golden") / f"{name}.txt"
    expected = [float(line) for line in golden.read_text().split()]
    assert len(expected) == 20
    losses = losses_of_twenty_steps(name)
    assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(losses, expected, strict=True)), losses
