"""CompRess: one and two queues, the network that fills the student's, and what moves when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mvmr.methods.compress import CompRess, CompRessConfig
from mvmr.types import Batch, Step
from ranks import run_on_ranks

STEP = Step(0, 10, 5)


def compress(**settings: Any) -> CompRess:
    """A small one: a linear map and a batch norm as the encoder, a teacher of width 7."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    return CompRess(encoder, 10, CompRessConfig.model_validate({"queue": 20, "teacher_width": 7, **settings}))


def batch_of(images: int = 8, *, number: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(number)
    views, rows = (torch.randn(*shape, generator=generator) for shape in ((1, images, 3, 2, 2), (images, 7)))
    return Batch(torch.arange(images), {"global": views}, {"teacher": rows})


def unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=1)


def divergence(s: Tensor, t: Tensor, of_student: Tensor, of_teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for i in range(len(s)):
        p, q = (t[i] @ of_teacher.T / temperature).softmax(0), (s[i] @ of_student.T / temperature).softmax(0)
        total += (p * (p / q).log()).sum().item() / len(s)
    return total


def test_defaults_are_the_paper_s() -> None:
    config = CompRessConfig()
    assert (config.queues, config.temperature, config.queue, config.momentum) == (2, 0.04, 128000, 0.999)
    assert (CompRess.base_lr, config.needs) == (0.01, {"global": 1})
    for wrong in ({"queues": 3}, {"temperature": 0}, {"queue": 0}, {"momentum": 1.1}, {"tau": 0.1}):
        with pytest.raises(ValidationError):
            CompRessConfig.model_validate(wrong)


@pytest.mark.parametrize("queues", [1, 2])
def test_loss_is_the_divergence_of_the_two_neighbourhoods(queues: int) -> None:
    method, batch = compress(queues=queues, temperature=0.3), batch_of()
    s, t = unit(method.head(method.encoder(batch.views["global"][0]))), unit(batch.representations["teacher"])
    own = method.teacher_queue if queues == 1 else method.student_queue
    assert own is not None
    assert s.shape == (8, 7 if queues == 1 else 10), "with two queues nothing is projected"
    expected = divergence(s, t, own.keys, method.teacher_queue.keys, 0.3)
    assert method.loss(batch, STEP)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_student_that_is_the_teacher_loses_nothing() -> None:
    method = CompRess(nn.Flatten(), 12, CompRessConfig(queues=1, queue=20, teacher_width=12))
    method.head = nn.Identity()
    views = batch_of().views
    terms = method.loss(Batch(torch.arange(8), views, {"teacher": views["global"][0].flatten(1)}), STEP)
    assert terms["loss"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["accuracy"].item() == 1.0
    assert terms["entropy/teacher"].item() == pytest.approx(terms["entropy/student"].item(), abs=1e-5)


def test_turned_spaces_have_the_same_neighbours() -> None:
    """Two queues compare each space with itself, so a rotation of the student's changes nothing."""
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3))).Q
    method = CompRess(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 12, bias=False)), 12, CompRessConfig(queue=20, teacher_width=12)
    )
    method.encoder[1].weight.data.copy_(turn)
    assert method.student_queue is not None
    method.student_queue.keys.copy_(method.teacher_queue.keys @ turn.T)
    views = batch_of().views
    terms = method.loss(Batch(torch.arange(8), views, {"teacher": views["global"][0].flatten(1)}), STEP)
    assert terms["loss"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_queues_are_filled_after_the_step_with_pairs(momentum: float | None) -> None:
    method, batch = compress(momentum=momentum), batch_of()
    assert method.student_queue is not None
    starts = [queue.keys.clone() for queue in (method.teacher_queue, method.student_queue)]
    filler = method.encoder if method.key_encoder is None else method.key_encoder
    expected = [unit(batch.representations["teacher"]), unit(filler(batch.views["global"][0]))]
    method.loss(batch, STEP)
    for queue, start in zip((method.teacher_queue, method.student_queue), starts, strict=True):
        assert torch.equal(queue.keys, start), "not while the loss is made"
    method.after_step(STEP)
    for queue, start, rows in zip((method.teacher_queue, method.student_queue), starts, expected, strict=True):
        torch.testing.assert_close(queue.keys[:8], rows)
        assert torch.equal(queue.keys[8:], start[8:])
        assert not queue.keys.requires_grad
    assert int(method.teacher_queue.pointer) == int(method.student_queue.pointer) == 8
    method.after_step(STEP)
    assert int(method.teacher_queue.pointer) == 8, "each batch once"


def test_who_is_trained_and_who_follows() -> None:
    method, batch = compress(momentum=0.5), batch_of()
    assert method.key_encoder is not None
    method.loss(batch, STEP)["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    assert all(not parameter.requires_grad for parameter in method.key_encoder.parameters())
    before = method.key_encoder[1].weight.clone()
    with torch.no_grad():
        method.encoder[1].weight.add_(1.0)
    method.after_step(STEP)
    torch.testing.assert_close(method.key_encoder[1].weight, (before + method.encoder[1].weight) / 2)
    assert method.exported() is method.encoder


def test_one_queue_has_neither_a_second_network_nor_a_second_queue() -> None:
    method = compress(queues=1)
    assert method.key_encoder is None
    assert method.student_queue is None
    assert isinstance(method.head, nn.Linear)
    assert method.head.weight.shape == (7, 10)
    assert not any("key_encoder" in name or "student_queue" in name for name in method.state_dict())


def test_a_momentum_without_a_follower_is_remarked_upon() -> None:
    def remarks(**settings: Any) -> list[str]:
        return CompRessConfig.model_validate(settings).remarks({"global": 1}, ["teacher"])

    assert remarks(queues=1) == remarks(momentum=0.99) == remarks(momentum=None) == []
    for momentum in (0.99, None):
        assert remarks(queues=1, momentum=momentum) == ["no effect with method.queues=1: method.momentum"]


def steps(rank: int, ranks: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and queues after three steps of plain descent on this rank's parts of three batches."""
    torch.set_num_threads(1)
    method = compress(**settings).double()
    for net in (method.encoder, method.key_encoder):
        if net is not None:
            net[2].eval()  # batch statistics across ranks are the engine's matter
    for number in range(3):
        whole = batch_of(number=number)
        part = {"teacher": whole.representations["teacher"].double().chunk(ranks)[rank]}
        views = {"global": whole.views["global"].double().chunk(ranks, 1)[rank]}
        method.zero_grad()
        method.loss(Batch(whole.index.chunk(ranks)[rank], views, part), STEP)["loss"].backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    if ranks > 1:
                        torch.distributed.all_reduce(parameter.grad)
                    parameter.sub_(0.5 * parameter.grad / ranks)
        method.after_step(STEP)
    return {name: value.clone() for name, value in method.state_dict().items()}


@pytest.mark.parametrize("settings", [{"queues": 1}, {"momentum": 0.5}, {"momentum": None}])
def test_two_ranks_take_the_steps_of_one(settings: dict[str, Any]) -> None:
    expected = steps(0, 1, settings)
    for state in run_on_ranks(steps, 2, 2, settings):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
