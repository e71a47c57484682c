"""MoCo v3: its loss, its moving average, its heads, and the two parts of a vision transformer that do not learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.config import load
from mvmr.methods.moco_v3 import MoCoV3, MoCoV3Config, sincos_positions
from mvmr.types import Batch, Step, UserError

SMALL = {"projector": [8, 8, 6], "predictor": [8, 6]}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method(encoder: nn.Module | None = None, dim: int = 12, **settings: Any) -> MoCoV3:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, dim)) if encoder is None else encoder
    return MoCoV3(flat, dim, MoCoV3Config.model_validate({**SMALL, **settings}))


def vision_transformer(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**{**small, **changes})


def images(side: int = 2, count: int = 8) -> Batch:
    return Batch(torch.arange(count), {"global": normal(2, count, 3, side, side).float()})


def train(moco: MoCoV3, batch: Batch, steps: int) -> None:
    optimizer = torch.optim.SGD(moco.parameter_groups(), lr=0.1)
    for number in range(steps):
        step = Step(number, steps, steps)
        optimizer.zero_grad()
        moco.loss(batch, step)["loss"].backward()
        optimizer.step()
        moco.after_step(step)


def test_loss_pairs_each_query_with_the_key_of_the_other_view() -> None:
    names = ("query1", "query2", "key1", "key2")
    embeddings = {name: normal(5, 6, seed=seed) for seed, name in enumerate(names)}
    unit = {name: [row / row.norm() for row in rows] for name, rows in embeddings.items()}
    expected, t = 0.0, 0.4
    for queries, keys in (("query1", "key2"), ("query2", "key1")):  # Algorithm 1
        for i in range(5):
            above = math.exp(float(unit[queries][i] @ unit[keys][i]) / t)
            below = sum(math.exp(float(unit[queries][i] @ k) / t) for k in unit[keys])
            expected -= 2 * t * math.log(above / below) / 5
    terms = method(temperature=t).objective(embeddings, Batch(torch.arange(5), {}), Step(0, 1, 1))
    assert terms["loss"].item() == pytest.approx(expected, abs=1e-10)


def test_heads_are_the_paper_s() -> None:
    moco = MoCoV3(nn.Identity(), 384, MoCoV3Config())
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    last = [nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in moco.projector] == block + block + last
    assert [type(layer) for layer in moco.predictor] == block + last
    shapes = [tuple(p.shape) for p in [*moco.projector.parameters(), *moco.predictor.parameters()] if p.ndim == 2]
    assert shapes == [(4096, 384), (4096, 4096), (256, 4096), (4096, 256), (256, 4096)]
    for head in (moco.projector, moco.predictor):
        assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
        assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)][-1] is False


def test_keys_start_as_a_copy_and_get_no_gradient() -> None:
    moco = method()
    moco.loss(images(), Step(0, 4, 4))["loss"].backward()
    for own, key in ((moco.encoder, moco.key_encoder), (moco.projector, moco.key_projector)):
        for p, k in zip(own.parameters(), key.parameters(), strict=True):
            assert torch.equal(p, k)
            assert p.grad is not None
            assert not k.requires_grad
            assert k.grad is None
    trained = {id(p) for group in moco.parameter_groups() for p in group["params"]}
    assert trained.isdisjoint({id(p) for p in moco.key_encoder.parameters()})


@pytest.mark.parametrize("m", [0.0, 0.6, 1.0])
def test_average_has_its_closed_form(m: float) -> None:
    """For a constant network, k_n = m^n k_0 + (1 - m^n) q."""
    moco = method(momentum=m, final_momentum=m)
    start = [k.clone() for k in moco.key_encoder.parameters()]
    with torch.no_grad():
        for p in moco.encoder.parameters():
            p.add_(1.0)
    for number in range(3):
        moco.after_step(Step(number, 3, 3))
    for k0, k, q in zip(start, moco.key_encoder.parameters(), moco.encoder.parameters(), strict=True):
        torch.testing.assert_close(k, m**3 * k0 + (1 - m**3) * q.detach(), rtol=1e-5, atol=1e-6)


def test_momentum_rises_to_its_end_along_a_half_cosine() -> None:
    moco = method(momentum=0.5, final_momentum=1.0)
    kept = []
    for number in range(5):
        with torch.no_grad():
            for p, k in zip(moco.encoder.parameters(), moco.key_encoder.parameters(), strict=True):
                p.fill_(0.0)
                k.fill_(1.0)
        moco.after_step(Step(number, 5, 5))
        kept.append(next(moco.key_encoder.parameters()).flatten()[0].item())
    assert kept == pytest.approx([1 - 0.25 * (1 + math.cos(math.pi * n / 4)) for n in range(5)], abs=1e-6)


def test_views_pass_apart_through_batch_norm() -> None:
    moco = method(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)))
    moco.projector, moco.predictor, moco.key_projector = nn.Sequential(), nn.Sequential(), nn.Sequential()
    view = normal(8, 3, 2, 2).float()
    embeddings = moco.embed(Batch(torch.arange(8), {"global": torch.stack([view, 5 + 9 * view])}))
    torch.testing.assert_close(embeddings["query1"], embeddings["query2"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embeddings["key1"], embeddings["key2"], rtol=1e-4, atol=1e-4)


def test_patch_embedding_and_positions_of_a_vision_transformer_do_not_move() -> None:
    moco = method(vision_transformer(), 16)
    before = {name: value.clone() for name, value in moco.encoder.state_dict().items()}
    train(moco, images(side=8), steps=3)
    moved = {name for name, value in moco.encoder.state_dict().items() if not torch.equal(value, before[name])}
    fixed = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    assert moved == set(before) - fixed
    for name in fixed:
        assert torch.equal(moco.key_encoder.state_dict()[name], before[name]), name


def test_both_learn_where_they_are_asked_to() -> None:
    moco = method(vision_transformer(), 16, freeze_patch_embedding=False, fixed_positions=False)
    before = {name: value.clone() for name, value in moco.encoder.state_dict().items()}
    train(moco, images(side=8), steps=3)
    assert all(not torch.equal(value, before[name]) for name, value in moco.encoder.state_dict().items())


def test_frozen_projection_is_drawn_in_xavier_s_range() -> None:
    weight = method(vision_transformer(embed_dim=64), 64).encoder.get_parameter("patch_embed.proj.weight")
    bound = math.sqrt(6 / (3 * 4 * 4 + 64))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    code = sincos_positions(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = [
                wave(place / 10000 ** (d / 2))
                for place in (row, column)
                for wave in (math.sin, math.cos)
                for d in (0, 1)
            ]
            assert code[row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)
    positions = method(vision_transformer(), 16).encoder.get_parameter("pos_embed")[0]  # [1 + 4, 16]
    assert positions[0].abs().sum() == 0  # the class token's
    assert torch.equal(positions[1:], sincos_positions(2, 2, 16))


@pytest.mark.parametrize("setting", ["freeze_patch_embedding", "fixed_positions"])
def test_an_encoder_without_patches_is_refused_only_when_insisted_on(setting: str) -> None:
    with pytest.raises(UserError, match=rf"method\.{setting} is true, but Sequential has no .*set it to auto"):
        method(**{setting: True})
    assert all(p.requires_grad for p in method(**{setting: "auto"}).encoder.parameters())


def test_heads_of_unequal_ends_are_refused() -> None:
    with pytest.raises(UserError, match="must end with one width, not 6 and 5"):
        load("moco_v3_cifar10_cpu", ["method.projector=[8, 6]", "method.predictor=[8, 5]"])


def test_rate_of_the_paper_s_recipe() -> None:
    assert load("moco_v3_imagenet").peak_lr == pytest.approx(1.5e-4 * 4096 / 256)
