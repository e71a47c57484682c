"""SEED: head, queue of the teacher's embeddings, temperatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mvmr.methods.seed import SEED, SEEDConfig
from mvmr.types import Batch, Step
from ranks import run_on_ranks

STEP = Step(0, 10, 5)


def seed(**settings: Any) -> SEED:
    """A small one: a linear map and a batch norm as the encoder, a teacher of width 7."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    return SEED(encoder, 10, SEEDConfig.model_validate({"hidden": 9, "queue": 20, "teacher_width": 7, **settings}))


def batch_of(images: int = 8, *, number: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(number)
    views, rows = (torch.randn(*shape, generator=generator) for shape in ((1, images, 3, 2, 2), (images, 7)))
    return Batch(torch.arange(images), {"global": views}, {"teacher": rows, "other": rows.flip(0)})


def test_defaults_are_the_paper_s() -> None:
    config = SEEDConfig()
    assert (config.student_temperature, config.teacher_temperature, config.queue) == (0.2, 0.01, 65536)
    assert (SEED.base_lr, config.needs, config.teacher) == (0.03, {"global": 1}, "teacher")
    for wrong in ({"teacher_temperature": 0}, {"queue": 0}, {"hidden": 0}, {"tau": 0.1}):
        with pytest.raises(ValidationError):
            SEEDConfig.model_validate(wrong)


def test_head_has_two_layers_and_ends_at_the_teacher_s_width() -> None:
    head = SEED(nn.Identity(), 512, SEEDConfig(queue=8, teacher_width=2048)).head
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in head[::2]] == [(512, 512), (2048, 512)]
    assert all(layer.bias is not None for layer in head[::2])


@pytest.mark.parametrize("teacher_temperature", [0.01, 1e-4])
def test_loss_is_the_papers(teacher_temperature: float) -> None:
    method, batch = seed(teacher_temperature=teacher_temperature, student_temperature=0.3), batch_of()
    s = functional.normalize(method.head(method.encoder(batch.views["global"][0])), dim=1)
    t = functional.normalize(batch.representations["teacher"], dim=1)
    total = 0.0
    for i in range(8):
        anchors = torch.cat([t[i : i + 1], method.queue.keys])  # the own embedding, then the queue
        p, q = (t[i] @ anchors.T / teacher_temperature).softmax(0), (s[i] @ anchors.T / 0.3).log_softmax(0)
        total -= (p * q).sum().item() / 8
    terms = method.loss(batch, STEP)
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    assert terms["kl"].item() == pytest.approx(total - terms["entropy"].item(), abs=1e-5)
    assert terms["similarity"].item() == pytest.approx((s * t).sum(1).mean().item(), abs=1e-6)
    if teacher_temperature == 1e-4:
        assert terms["entropy"].item() == pytest.approx(0.0, abs=1e-6), "one-hot on the own image"


def test_a_student_that_is_the_teacher_has_no_divergence() -> None:
    method = SEED(nn.Flatten(), 12, SEEDConfig(queue=20, teacher_width=12, teacher_temperature=0.2))
    method.head = nn.Sequential()
    views = batch_of().views
    terms = method.loss(Batch(torch.arange(8), views, {"teacher": views["global"][0].flatten(1)}), STEP)
    assert terms["kl"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["accuracy"].item() == 1.0


def test_teacher_is_enqueued_after_the_step_and_once() -> None:
    method = seed()
    start = method.queue.keys.clone()
    for number in (1, 2):
        method.loss(batch_of(number=number), STEP)
    assert torch.equal(method.queue.keys, start), "not while the loss is made"
    method.after_step(STEP)
    expected = [functional.normalize(batch_of(number=number).representations["teacher"], dim=1) for number in (1, 2)]
    torch.testing.assert_close(method.queue.keys[:16], torch.cat(expected))
    assert torch.equal(method.queue.keys[16:], start[16:])
    filled = method.queue.keys.clone()
    method.after_step(STEP)
    assert int(method.queue.pointer) == 16
    assert torch.equal(method.queue.keys, filled), "each batch once"


def test_teacher_is_named_in_the_settings() -> None:
    method, batch = seed(teacher="other"), batch_of()
    method.loss(batch, STEP)
    method.after_step(STEP)
    torch.testing.assert_close(method.queue.keys[:8], functional.normalize(batch.representations["other"], dim=1))


def steps(rank: int, ranks: int) -> dict[str, Tensor]:
    """Weights and queue after three steps of plain descent on this rank's parts of three batches."""
    torch.set_num_threads(1)
    method = seed(queue=19).double()
    method.encoder[2].eval()  # batch statistics across ranks are the engine's matter
    for number in range(3):
        whole = batch_of(number=number)
        part = {name: rows.double().chunk(ranks)[rank] for name, rows in whole.representations.items()}
        views = {"global": whole.views["global"].double().chunk(ranks, 1)[rank]}
        method.zero_grad()
        method.loss(Batch(whole.index.chunk(ranks)[rank], views, part), STEP)["loss"].backward()
        with torch.no_grad():
            for parameter in method.parameters():
                assert parameter.grad is not None
                if ranks > 1:
                    torch.distributed.all_reduce(parameter.grad)
                parameter.sub_(0.5 * parameter.grad / ranks)
        method.after_step(STEP)
    return {name: value.clone() for name, value in method.state_dict().items()}


def test_two_ranks_take_the_steps_of_one() -> None:
    expected = steps(0, 1)
    for state in run_on_ranks(steps, 2, 2):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
