"""SimCLR: its heads, its one forward pass, and the two scales of its loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.config import load
from mvmr.methods.simclr import SimCLR, SimCLRConfig
from mvmr.types import Batch, Step, UserError

STEP = Step(0, 1, 1)


def method(dim: int = 12, **settings: Any) -> SimCLR:
    return SimCLR(nn.Flatten(), dim, SimCLRConfig.model_validate(settings))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_loss_is_the_paper_s_mean_over_both_views_and_the_official_one_twice_that() -> None:
    z1, z2, t = normal(5, 4), normal(5, 4, seed=1), 0.5
    unit = [row / row.norm() for row in torch.cat([z1, z2])]
    total = 0.0
    for i in range(10):  # Eq. 1 for (i, j) and (j, i)
        j = (i + 5) % 10
        below = sum(math.exp(float(unit[i] @ unit[k]) / t) for k in range(10) if k != i)
        total -= math.log(math.exp(float(unit[i] @ unit[j]) / t) / below)
    embeddings, batch = {"first": z1, "second": z2}, Batch(torch.arange(5), {})
    paper = method(temperature=t).objective(embeddings, batch, STEP)
    official = method(temperature=t, loss_scale="official").objective(embeddings, batch, STEP)
    assert paper["loss"].item() == pytest.approx(total / 10, abs=1e-10)
    assert official["loss"].item() == pytest.approx(2 * total / 10, abs=1e-10)
    assert paper["z_std"].item() == pytest.approx(torch.stack(unit[:5]).std(0, correction=0).mean().item(), abs=1e-12)


def test_head_of_the_paper_is_two_linear_layers() -> None:
    head = method(2048).projector
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in head.parameters()] == [(2048, 2048), (128, 2048)]


def test_head_of_version_two_has_three_normalised_layers() -> None:
    head = method(64, head="v2").projector
    blocks = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in head] == blocks
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(64, 64), (64, 64), (128, 64)]
    assert all(layer.bias is None for layer in linear)
    norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
    assert [(norm.weight.requires_grad, norm.bias.requires_grad) for norm in norms] == [(True, True)] * 2 + [
        (True, False)
    ]
    assert norms[-1].bias.abs().sum() == 0


def test_widths_of_the_head_can_be_given() -> None:
    head = method(16, projector=[32, 8]).projector
    assert [tuple(p.shape) for p in head.parameters()] == [(32, 16), (8, 32)]


def test_both_views_share_one_forward_pass() -> None:
    """Batch norm sees them together, so a shift between the views survives it; a third view is left alone."""
    simclr = SimCLR(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), 12, SimCLRConfig())
    simclr.projector = nn.Sequential()
    first = torch.randn(8, 3, 2, 2)
    views = torch.stack([first, first + 9, torch.full_like(first, torch.nan)])
    embeddings = simclr.embed(Batch(torch.arange(8), {"global": views}))
    assert embeddings["first"].shape == (8, 12)
    assert (embeddings["second"] - embeddings["first"]).min() > 1
    together = torch.cat([embeddings["first"], embeddings["second"]])
    torch.testing.assert_close(together.mean(0), torch.zeros(12), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "named"),
    [("method.temperature=0", "method.temperature"), ("method.projector=[]", "method.projector"),
     ("method.projector=[8, 0]", "method.projector"), ("method.head=v3", "method.head"),
     ("views={recipe: mvmr, size: 32}", "2 views of the stream `global`")],
)  # fmt: skip
def test_wrong_settings_are_named(override: str, named: str) -> None:
    with pytest.raises(UserError) as raised:
        load("simclr_cifar10_cpu", [override])
    assert named in str(raised.value)


def test_auto_rate_is_the_paper_s() -> None:
    """Section 2.3: 4.8 = 0.3 x 4096 / 256."""
    assert load("simclr_imagenet").peak_lr == pytest.approx(4.8)
