"""DINO's networks, its two moving averages and its schedules; what the loss computes is in tests/losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mvmr.losses.self_distillation import entropy, sharpened
from mvmr.methods.dino import DINO, DINOConfig, Head
from mvmr.nets.prototypes import Prototypes
from mvmr.types import Batch, Step
from pool import Pool

SMALL: dict[str, Any] = {"hidden": 12, "bottleneck": 6, "prototypes": 9}
B = 4


def method(**settings: Any) -> DINO:
    torch.manual_seed(0)
    return DINO(Pool(), 5, DINOConfig.model_validate({**SMALL, **settings})).train()


def batch(*, small: int = 3, side: int = 4) -> Batch:
    torch.manual_seed(1)
    views = {"global": torch.randn(2, B, 3, 8, 8)}
    if small:
        views["local"] = torch.randn(small, B, 3, side, side)
    return Batch(torch.arange(B), views)


def step(at: int = 0, *, total: int = 20, epoch: int = 5) -> Step:
    return Step(at, total, epoch)


def one_step(dino: DINO, of: Batch, at: Step) -> dict[str, Tensor]:
    terms = dino.loss(of, at)
    terms["loss"].backward()
    dino.after_backward(at)
    dino.after_step(at)
    return terms


def test_objective_is_the_papers() -> None:
    dino, given = method(), batch()
    dino.centre.uniform_(-1, 1)
    terms = dino.loss(given, step())
    every = [*given.views["global"], *given.views["local"]]
    student = torch.stack([dino.head(dino.encoder(view)) for view in every], dim=1)  # [B, 5, K]
    teacher = torch.stack([dino.teacher_head(dino.teacher_encoder(view)) for view in every[:2]], dim=1)
    p = torch.softmax((teacher - dino.centre) / 0.04, -1)
    log_s = torch.log_softmax(student / 0.1, -1)
    pairs = [-(p[:, t] * log_s[:, v]).sum(1).mean() for t in range(2) for v in range(5) if t != v]
    assert len(pairs) == 2 * 5 - 2
    assert terms["loss"].item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    each = -(p * p.log()).sum(-1).mean().item()
    assert terms["entropy/image"].item() == pytest.approx(each, rel=1e-4)
    assert terms["kl"].item() == pytest.approx(terms["loss"].item() - each, abs=1e-5)
    mean = p.mean((0, 1))
    assert terms["entropy/mean"].item() == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-4)
    assert each <= terms["entropy/mean"] <= math.log(SMALL["prototypes"])


def test_one_pass_a_size_and_large_views_alone_for_the_teacher() -> None:
    dino = method()
    shapes = {key: value.shape for key, value in dino.embed(batch()).items()}
    assert shapes == {"student": (B, 5, 9), "teacher": (B, 2, 9)}
    assert dino.encoder.given == [(2 * B, 3, 8, 8), (3 * B, 3, 4, 4)]
    assert dino.teacher_encoder.given == [(2 * B, 3, 8, 8)]
    dino.encoder.given.clear()
    dino.embed(batch(side=8))
    assert dino.encoder.given == [(5 * B, 3, 8, 8)]  # as in the released code, views of one size go together


def test_chunks_of_images_give_what_the_batch_gives() -> None:
    dino, whole = method(), batch()
    parts = [Batch(whole.index[i : i + 2], {k: v[:, i : i + 2] for k, v in whole.views.items()}) for i in (0, 2)]
    cut = [dino.embed(part) for part in parts]
    for key, value in dino.embed(whole).items():
        torch.testing.assert_close(torch.cat([part[key] for part in cut]), value)


def test_two_views_alone_are_enough() -> None:
    dino = method()
    terms = dino.loss(batch(small=0), step())
    assert terms["loss"].isfinite()
    DINOConfig.model_validate(SMALL).check_views({"global": 2})
    with pytest.raises(ValueError, match="2 views of the stream `global`"):
        DINOConfig.model_validate(SMALL).check_views({"global": 1, "local": 6})


def test_centre_follows_the_mean_of_raw_scores_after_the_step() -> None:
    dino, given = method(momentum=1.0, centre_momentum=0.9), batch()
    raw = dino.embed(given)["teacher"].mean((0, 1))
    assert raw.abs().max() > 1e-3
    for n in range(1, 4):  # with a constant teacher, c = (1 - m^n) o
        before = dino.centre.clone()
        dino.loss(given, step(n - 1))
        assert torch.equal(dino.centre, before)
        dino.after_step(step(n - 1))
        torch.testing.assert_close(dino.centre, (1 - 0.9**n) * raw)
    assert dino._pending == []
    dino.after_step(step(3))  # without a new batch it stays
    torch.testing.assert_close(dino.centre, (1 - 0.9**3) * raw)
    assert dino.centre.dtype == torch.float32
    assert "centre" in dino.state_dict()


def test_accumulated_batches_move_the_centre_once() -> None:
    dino, first = method(momentum=1.0), batch()
    second = Batch(first.index, {key: 2 * value for key, value in first.views.items()})
    means = [dino.embed(each)["teacher"].mean((0, 1)) for each in (first, second)]
    for each in (first, second):
        dino.loss(each, step())
    dino.after_step(step())
    torch.testing.assert_close(dino.centre, 0.1 * (means[0] + means[1]) / 2)


def test_a_constant_in_the_teachers_scores_is_centred_away() -> None:
    """The sign: with c subtracted the objective forgets a constant; added, it would never."""
    dino, given = method(momentum=1.0), batch()
    embeddings = {key: value.detach() for key, value in dino.embed(given).items()}
    free = dict(embeddings)
    free["teacher"] = embeddings["teacher"] - embeddings["teacher"].mean((0, 1))
    wanted = dino.objective(free, given, step())
    dino._pending.clear()
    constant = torch.linspace(-1, 1, SMALL["prototypes"])
    shifted = {**free, "teacher": free["teacher"] + constant}
    for _ in range(120):
        dino.objective(shifted, given, step())
        dino.after_step(step())
    found = dino.objective(shifted, given, step())
    for key in ("loss", "entropy/image", "entropy/mean"):
        assert found[key].item() == pytest.approx(wanted[key].item(), rel=1e-3), key
    added = sharpened(shifted["teacher"], -dino.centre, temperature=0.04)
    assert entropy(added).mean() < 0.01 < 0.5 * wanted["entropy/image"]  # every image says the same, with certainty


def test_teacher_starts_as_the_student_and_follows_after_the_step() -> None:
    dino, given = method(momentum=0.9, final_momentum=0.9, freeze_last_layer_epochs=0), batch()
    for mine, theirs in [(dino.teacher_encoder, dino.encoder), (dino.teacher_head, dino.head)]:
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
        assert not any(p.requires_grad for p in mine.parameters())
    start = {key: value.clone() for key, value in dino.state_dict().items()}
    with torch.no_grad():
        for parameter in [*dino.encoder.parameters(), *dino.head.parameters()]:
            parameter.add_(1.0)
    one_step(dino, given, step())
    assert all(p.grad is None for p in [*dino.teacher_encoder.parameters(), *dino.teacher_head.parameters()])
    for key in ("teacher_encoder.layer.weight", "teacher_head.prototypes.weight"):
        torch.testing.assert_close(dino.state_dict()[key], start[key] + 0.1)
    assert dino.exported() is dino.teacher_encoder


@pytest.mark.parametrize(("at", "momentum"), [(0, 0.5), (10, 0.75), (20, 1.0)])
def test_momentum_runs_along_a_half_cosine(at: int, momentum: float) -> None:
    dino = method(momentum=0.5)
    before = dino.teacher_encoder.layer.weight.clone()
    with torch.no_grad():
        dino.encoder.layer.weight.add_(1.0)
    dino.after_step(step(at, total=21))
    torch.testing.assert_close(dino.teacher_encoder.layer.weight, before + (1 - momentum))


def test_teacher_temperature_rises_once_an_epoch() -> None:
    dino = method(temperature_epochs=4, warmup_teacher_temperature=0.04, teacher_temperature=0.07)
    found = [dino.teacher_temperature(Step(at, 100, 10)) for at in (0, 9, 10, 25, 30, 39, 40, 99)]
    assert found == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07, 0.07, 0.07])
    assert method(temperature_epochs=0).teacher_temperature(step()) == 0.07
    constant = method(temperature_epochs=1, warmup_teacher_temperature=0.02)
    assert [constant.teacher_temperature(Step(at, 100, 10)) for at in (0, 10)] == [0.02, 0.07]


def test_last_layer_is_frozen_in_the_first_epoch() -> None:
    dino, given = method(freeze_last_layer_epochs=1, norm_last_layer=False), batch()
    last = list(dino.head.prototypes.parameters())
    assert len(last) == 2
    optimizer = torch.optim.SGD([p for p in dino.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=0.1)
    for at in range(7):
        before = [p.detach().clone() for p in last]
        optimizer.zero_grad()
        dino.loss(given, step(at))["loss"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in last)
        dino.after_backward(step(at))
        optimizer.step()
        dino.after_step(step(at))
        assert all(torch.equal(old, p) == (at < 5) for old, p in zip(before, last, strict=True)), at
        assert dino.head.mlp[0].weight.grad.abs().sum() > 0


def test_head_is_the_papers() -> None:
    head = Head(384, DINOConfig(hidden=2048, bottleneck=256, prototypes=100))
    linear = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(384, 2048), (2048, 2048), (2048, 256)]
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert all(torch.equal(layer.bias, torch.zeros_like(layer.bias)) for layer in linear)
    assert linear[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    scores = head(torch.randn(3, 384))
    assert scores.abs().max() <= 1 + 1e-6  # cosines
    with_norm = Head(8, DINOConfig.model_validate({**SMALL, "head_batch_norm": True}))
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in with_norm.mlp) == 2


def test_prototypes_have_rows_of_unit_norm() -> None:
    torch.manual_seed(0)
    layer, x = Prototypes(6, 9).double(), torch.randn(4, 6, dtype=torch.float64)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    rows = layer.weight.detach()
    expected = [[float(x[b] @ rows[k] / rows[k].norm()) for k in range(9)] for b in range(4)]
    torch.testing.assert_close(layer(x), torch.tensor(expected, dtype=torch.float64))
    before = layer(x)
    with torch.no_grad():
        layer.weight *= torch.linspace(0.1, 5, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(layer(x), before)  # only directions count
    layer(x)[:, 0].sum().backward()
    assert (layer.weight.grad[0] @ layer.weight[0]).abs() < 1e-10  # so the gradient is across them
    free = Prototypes(6, 9, trainable_gain=True).double()
    with torch.no_grad():
        free.gain.copy_(torch.arange(9))
    torch.testing.assert_close(
        free(x), functional.linear(x, functional.normalize(free.weight, dim=1)) * torch.arange(9)
    )
    assert free.gain.requires_grad


def test_prototypes_are_float32_under_autocast() -> None:
    layer, x = Prototypes(6, 9), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.float()))
        assert layer(x.bfloat16()).dtype == torch.float32


def test_stochastic_depth_is_the_students_alone() -> None:
    import timm

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=3,
        drop_path_rate=0.6, dynamic_img_size=True,
    )  # fmt: skip
    dino = DINO(net, 12, DINOConfig.model_validate(SMALL)).train()
    images = torch.randn(8, 3, 16, 16)
    assert dino.teacher_encoder.training
    teacher = [dino.teacher_encoder(images) for _ in range(2)]
    assert torch.equal(*teacher)
    assert not torch.equal(*[dino.encoder(images) for _ in range(2)])
    torch.testing.assert_close(teacher[0], dino.encoder.eval()(images), rtol=1e-5, atol=1e-5)
    assert [module.drop_prob for module in dino.encoder.modules() if type(module).__name__ == "DropPath"]
    given = Batch(torch.arange(8), {"global": images.repeat(2, 1, 1, 1, 1), "local": images[None, ..., :8, :8]})
    assert dino.train().loss(given, step())["loss"].isfinite()


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"teacher_temperature": 0.0}, {"momentum": 1.1}, {"prototypes": 1}, {"temperature_epochs": -1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            DINOConfig.model_validate(wrong)
