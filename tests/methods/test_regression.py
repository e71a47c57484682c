"""Reg and Reg-BN: a linear head, and statistics of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mvmr.methods.regression import Regression, RegressionConfig
from mvmr.types import Batch, Step
from ranks import averaged_gradients, run_on_ranks

STEP = Step(0, 10, 5)


def reg(**settings: Any) -> Regression:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.ReLU())
    return Regression(encoder, 10, RegressionConfig.model_validate({"teacher_width": 7, **settings}))


def batch_of(images: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views, rows = (torch.randn(*shape, generator=generator) for shape in ((1, images, 3, 2, 2), (images, 7)))
    return Batch(torch.arange(images), {"global": views}, {"teacher": rows})


def test_defaults() -> None:
    assert RegressionConfig().batch_norm is False
    assert RegressionConfig().needs == {"global": 1}
    with pytest.raises(ValidationError):
        RegressionConfig.model_validate({"norm": True})


@pytest.mark.parametrize("batch_norm", [False, True])
def test_loss_is_the_squared_distance(batch_norm: bool) -> None:
    method, batch = reg(batch_norm=batch_norm), batch_of()
    assert (method.head.bias is None) == batch_norm, "a bias that batch norm takes away would not be trained"
    s, t = method.head(method.encoder(batch.views["global"][0])), batch.representations["teacher"]
    if batch_norm:
        norm = nn.BatchNorm1d(7, affine=False)
        s, t = norm(s), norm(t)
    terms = method.loss(batch, STEP)
    assert terms["loss"].item() == pytest.approx((s - t).square().mean().item(), rel=1e-5)
    worst = 1.0 if batch_norm else t.var(0, correction=0).mean().item()
    assert terms["explained"].item() == pytest.approx(1 - terms["loss"].item() / worst, abs=1e-5)


def test_a_linear_teacher_is_learnt() -> None:
    method, batch = reg(), batch_of(64)
    target = torch.randn(7, 10) @ method.encoder(batch.views["global"][0]).detach().T
    batch = Batch(batch.index, batch.views, {"teacher": target.T + 2.0})
    optimiser = torch.optim.LBFGS(method.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = method.loss(batch, STEP)["loss"]
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    terms = method.loss(batch, STEP)
    assert terms["explained"].item() > 0.999
    assert terms["cosine"].item() > 0.999


def test_a_constant_teacher_is_no_accident() -> None:
    batch = batch_of()
    constant = Batch(batch.index, batch.views, {"teacher": torch.ones(8, 7)})
    for batch_norm in (False, True):
        assert all(term.isfinite() for term in reg(batch_norm=batch_norm).loss(constant, STEP).values())


def gradients(rank: int, ranks: int, batch_norm: bool) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    method, batch = reg(batch_norm=batch_norm).double(), batch_of()
    part = {"teacher": batch.representations["teacher"].double().chunk(ranks)[rank]}
    views = {"global": batch.views["global"].double().chunk(ranks, 1)[rank]}
    method.loss(Batch(batch.index.chunk(ranks)[rank], views, part), STEP)["loss"].backward()
    return averaged_gradients(method, ranks)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_two_ranks_have_the_gradient_of_one(batch_norm: bool) -> None:
    expected = gradients(0, 1, batch_norm)
    for found in run_on_ranks(gradients, 2, 2, batch_norm):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
