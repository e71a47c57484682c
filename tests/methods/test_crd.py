"""CRD: memories, negatives as a function of image and step, and what is kept of the first batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mvmr.methods.crd import CRD, CRDConfig
from mvmr.types import Batch, Step
from ranks import run_on_ranks

STEP = Step(3, 10, 5)
IMAGES = 30


def crd(**settings: Any) -> CRD:
    """A small one: a linear map as the encoder, a teacher of width 7, a data set of 30 images."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    given = {"dim": 6, "negatives": 9, "teacher_width": 7, **settings}
    method = CRD(encoder, 10, CRDConfig.model_validate(given))
    method.prepare(IMAGES)
    return method


def batch_of(images: int = 8, *, number: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(number)
    views, rows = (torch.randn(*shape, generator=generator) for shape in ((1, images, 3, 2, 2), (images, 7)))
    index = torch.randperm(IMAGES, generator=generator)[:images]
    return Batch(index, {"global": views}, {"teacher": rows})


def embedded(method: CRD, batch: Batch) -> tuple[Tensor, Tensor]:
    student = method.student_head(method.encoder(batch.views["global"][0]))
    teacher = method.teacher_head(batch.representations["teacher"])
    return functional.normalize(student, dim=1), functional.normalize(teacher, dim=1)


def test_defaults_are_the_released_code_s() -> None:
    config = CRDConfig()
    assert (config.dim, config.negatives, config.temperature, config.momentum) == (128, 16384, 0.07, 0.5)
    assert (CRD.base_lr, config.needs) == (0.2, {"global": 1})
    for wrong in ({"dim": 0}, {"negatives": 0}, {"temperature": 0}, {"momentum": 1.1}, {"gamma": 1}):
        with pytest.raises(ValidationError):
            CRDConfig.model_validate(wrong)


def test_loss_is_that_of_both_sides() -> None:
    method, batch = crd(temperature=0.5), batch_of()
    s, t = (x.detach() for x in embedded(method, batch))
    rows = torch.cat([batch.index[:, None], method.negatives(batch.index, STEP)], 1)
    expected = 0.0
    for anchors, memory in ((s, method.teacher_memory), (t, method.student_memory)):
        exponentials = [[math.exp(float(anchors[b] @ memory[i]) / 0.5) for i in rows[b]] for b in range(8)]
        z = sum(map(sum, exponentials)) / 80 * IMAGES
        for own, *others in exponentials:
            noise = 9 / IMAGES
            expected -= math.log(own / z / (own / z + noise + 1e-7)) / 8
            expected -= sum(math.log(noise / (p / z + noise + 1e-7)) for p in others) / 8
    terms = method.loss(batch, STEP)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["loss"].item() == pytest.approx((terms["student"] + terms["teacher"]).item())


def test_negatives_are_a_function_of_seed_image_and_step() -> None:
    method, index = crd(negatives=500), torch.tensor([3, 17, 4])
    drawn = method.negatives(index, STEP)
    assert drawn.shape == (3, 500)
    assert torch.equal(method.negatives(index.flip(0), STEP), drawn.flip(0)), "not of the place in the batch"
    assert not torch.equal(method.negatives(index, Step(4, 10, 5)), drawn)
    assert torch.equal(crd(negatives=500).negatives(index, STEP), drawn)
    torch.manual_seed(1)
    other = CRD(nn.Flatten(), 12, method.config)
    other.prepare(IMAGES)
    assert not torch.equal(other.negatives(index, STEP), drawn)


def test_negatives_are_uniform_over_the_images() -> None:
    drawn = crd(negatives=3000).negatives(torch.arange(10), STEP)
    counts = drawn.flatten().bincount(minlength=IMAGES)
    assert len(counts) == IMAGES
    expected = 30_000 / IMAGES  # deviation of a count: 31
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_memories_move_after_the_step_and_keep_unit_norm() -> None:
    method, batch = crd(momentum=0.25), batch_of()
    before = [method.student_memory.clone(), method.teacher_memory.clone()]
    met = embedded(method, batch)
    method.loss(batch, STEP)
    assert torch.equal(method.student_memory, before[0]), "not while the loss is made"
    assert torch.equal(method.partitions, torch.zeros(2))
    method.after_step(STEP)
    others = torch.ones(IMAGES, dtype=torch.bool)
    others[batch.index] = False
    for memory, start, rows in zip((method.student_memory, method.teacher_memory), before, met, strict=True):
        expected = functional.normalize(0.25 * start[batch.index] + 0.75 * rows, dim=1)
        torch.testing.assert_close(memory[batch.index], expected)
        assert torch.equal(memory[others], start[others])
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(IMAGES))
        assert not memory.requires_grad
    again = method.student_memory.clone()
    method.after_step(STEP)
    assert torch.equal(method.student_memory, again), "each batch once"


def test_the_partition_functions_are_those_of_the_first_batch() -> None:
    method = crd()
    first, second = batch_of(number=1), batch_of(number=2)
    for batch in (first, second):  # an accumulated step: each part has its own until one is kept
        method.loss(batch, STEP)
    alone = crd()
    alone.loss(first, STEP)
    for each in (method, alone):
        each.after_step(STEP)
    kept = method.partitions.clone()
    torch.testing.assert_close(kept, alone.partitions)
    assert (kept > 0).all()
    assert kept[0] != kept[1]
    method.loss(second, STEP)
    method.after_step(STEP)
    assert torch.equal(method.partitions, kept)


def test_both_heads_are_trained_and_the_state_is_saved() -> None:
    method, batch = crd(), batch_of()
    method.loss(batch, STEP)["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert method.exported() is method.encoder
    method.after_step(STEP)
    assert {"student_memory", "teacher_memory", "partitions"} <= set(method.state_dict())
    again = crd()
    again.load_state_dict(method.state_dict())
    assert again.loss(batch, STEP)["loss"].item() == pytest.approx(method.loss(batch, STEP)["loss"].item())


def steps(rank: int, ranks: int) -> dict[str, Tensor]:
    """Weights and memories after three steps of plain descent on this rank's parts of three batches."""
    torch.set_num_threads(1)
    method = crd().double()
    for number in range(3):
        whole = batch_of(number=number)
        part = {"teacher": whole.representations["teacher"].double().chunk(ranks)[rank]}
        views = {"global": whole.views["global"].double().chunk(ranks, 1)[rank]}
        step = Step(number, 10, 5)
        method.zero_grad()
        method.loss(Batch(whole.index.chunk(ranks)[rank], views, part), step)["loss"].backward()
        with torch.no_grad():
            for parameter in method.parameters():
                assert parameter.grad is not None
                if ranks > 1:
                    torch.distributed.all_reduce(parameter.grad)
                parameter.sub_(0.1 * parameter.grad / ranks)
        method.after_step(step)
    return {name: value.clone() for name, value in method.state_dict().items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_the_steps_of_one(ranks: int) -> None:
    expected = steps(0, 1)
    for state in run_on_ranks(steps, ranks, ranks):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
