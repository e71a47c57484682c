"""OSS's head with and without dropout: one set of weights, the order of its layers, and its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mvmr.nets.dropout_head import VIEWS, Branch, DropoutHead
from mvmr.ops.dropout import kept_units
from mvmr.ops.layers import mlp

V, B, DIM, HIDDEN, OUT = 3, 6, 5, 8, 4
KEY, INDEX = torch.tensor([5, 6]), torch.arange(10, 10 + B)


def head(**settings: Any) -> DropoutHead:
    torch.manual_seed(0)
    given = {"rates": (0.3, 0.2), **settings}
    return DropoutHead([DIM, HIDDEN, OUT], **given).double().train()


def features() -> Tensor:
    return torch.randn(V, B, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mask(layer: int, width: int, rate: float, number: int = 0) -> Tensor:
    """[V B, width]: 0 or 1 / (1 - rate), view by view."""
    streams = [(number * VIEWS + view) * 2 + layer for view in range(V)]
    kept = [kept_units(KEY, INDEX, stream, width=width, rate=rate) for stream in streams]
    return torch.cat(kept) / (1 - rate)


def by_hand(net: DropoutHead, after: str, number: int = 0) -> Tensor:
    first, norm, _, last = net
    d1, d2 = mask(0, HIDDEN, 0.3, number), mask(1, OUT, 0.2, number)

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias

    x = functional.linear(features().flatten(0, 1), first.weight, first.bias)
    x = normed(x * d1).relu() if after == "linear" else normed(x).relu() * d1
    return (functional.linear(x, last.weight, last.bias) * d2).unflatten(0, (V, B))


@pytest.mark.parametrize("after", ["linear", "relu"])
@pytest.mark.parametrize("number", [0, 1])
def test_dropout_follows_each_linear(after: Any, number: int) -> None:
    net = head(after=after, number=number)
    torch.testing.assert_close(net.with_dropout(features(), INDEX, KEY), by_hand(net, after, number))


def test_places_networks_views_and_images_have_masks_of_their_own() -> None:
    x = features()[:1, :1].expand(V, B, DIM)
    net, other = head(), head(number=1)
    found = net.with_dropout(x, INDEX, KEY)
    assert len({tuple(row.tolist()) for row in found.flatten(0, 1).gt(0)}) > 3
    assert not torch.equal(found, other.with_dropout(x, INDEX, KEY))
    assert not torch.equal(found, head(after="relu").with_dropout(x, INDEX, KEY))
    assert torch.equal(found, head().with_dropout(x, INDEX, KEY))


def test_without_rates_it_is_the_head_itself() -> None:
    net = head(rates=(0.0, 0.0))
    plain = net(features().flatten(0, 1)).unflatten(0, (V, B))
    assert torch.equal(net.with_dropout(features(), INDEX, KEY), plain)


@pytest.mark.parametrize("tracks", [True, False])
def test_statistics_of_the_dropout_pass(tracks: bool) -> None:
    net = head(tracks_statistics=tracks)
    norm: Any = net[1]
    before = [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]
    net.with_dropout(features(), INDEX, KEY)
    after = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [not tracks] * 3
    net(features().flatten(0, 1))
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 1 + tracks
    assert dict(norm.named_buffers())["num_batches_tracked"] is norm.num_batches_tracked


def test_names_are_those_of_swavs_projector() -> None:
    assert list(head().state_dict()) == list(mlp([DIM, HIDDEN, OUT], bias=True).state_dict())


def test_branch_puts_images_first() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, DIM)).double()
    branch = Branch(
        encoder, [DIM, HIDDEN, OUT], rates=(0.3, 0.2), after="linear", tracks_statistics=True, number=2
    ).double()
    views = torch.randn(V, B, 3, 4, 4, dtype=torch.float64)
    x = branch([views])
    assert x.shape == (V, B, DIM)
    torch.testing.assert_close(x[1], encoder(views[1]))
    plain, dropped = branch.project(x), branch.project_with_dropout(x, INDEX, KEY)
    assert plain.shape == dropped.shape == (B, V, OUT)
    torch.testing.assert_close(plain[:, 2], branch.projector(x.flatten(0, 1))[2 * B :])
    torch.testing.assert_close(dropped[:, 1], branch.projector.with_dropout(x, INDEX, KEY)[1])
