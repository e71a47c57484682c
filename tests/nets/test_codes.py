"""SwAV's prototypes, its codes with and without a queue, and views of several sizes through one encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvmr.nets.codes import ClusterPrototypes, CodeMaker
from mvmr.nets.multicrop import encode_views
from mvmr.ops.sinkhorn import sinkhorn
from ranks import run_on_ranks

B, D, K = 6, 4, 5


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def prototypes() -> ClusterPrototypes:
    torch.manual_seed(0)
    return ClusterPrototypes(D, K).double()


def test_prototypes_are_unit_rows_from_the_start_and_after_every_step() -> None:
    layer, z = prototypes(), unit(B, 2, D)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(K, dtype=torch.float64))
    torch.testing.assert_close(layer(z), torch.einsum("bvd,kd->bvk", z, layer.weight))
    with torch.no_grad():
        layer.weight *= torch.linspace(0.2, 3, K)[:, None]
    moved = layer.weight.detach().clone()
    layer.renormalise()
    torch.testing.assert_close(layer.weight, moved / moved.norm(dim=1, keepdim=True))


def test_gradient_of_prototypes_is_with_respect_to_the_unit_rows() -> None:
    """As in SwAV, unlike weight norm: it has a part along a row, and it is the plain product."""
    layer, z = prototypes(), unit(B, D)
    layer(z)[:, 1].sum().backward()
    torch.testing.assert_close(layer.weight.grad[1], z.sum(0))
    assert (layer.weight.grad[1] @ layer.weight[1]).abs() > 1e-3
    layer.weight.grad = None
    wanted = z.clone().requires_grad_()
    layer(wanted, learn=False).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(wanted.grad, layer.weight.detach().sum(0).expand(B, D))


def test_scores_are_float32_under_autocast() -> None:
    layer, z = prototypes().float(), unit(B, D).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(z), layer(z.clone()))
        assert layer(z.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(layer(z), z @ layer.weight.T)


def test_codes_are_a_transport_of_each_view() -> None:
    layer, z = prototypes(), unit(B, 2, D)
    q = CodeMaker(D)(z, layer)
    assert q.shape == (B, 2, K)
    assert not q.requires_grad
    for view in range(2):
        torch.testing.assert_close(q[:, view], sinkhorn(z[:, view] @ layer.weight.detach().T, epsilon=0.05))


def test_queue_is_used_once_it_is_full_and_holds_the_newest() -> None:
    layer, codes, alone = prototypes(), CodeMaker(D, size=7).double(), CodeMaker(D)
    batches = [unit(3, 2, D, seed=seed) for seed in range(5)]
    z = unit(B, 2, D, seed=9)
    assert codes.queue.keys.abs().sum() == 0
    for told, batch in enumerate(batches):
        codes.push(batch)
        found = codes(z, layer)
        history = torch.cat(batches[: told + 1])
        if len(history) < 7:
            torch.testing.assert_close(found, alone(z, layer))
            continue
        for view in range(2):  # the current scores come last, and only their codes are returned
            rows = torch.cat([history[-7:, view], z[:, view]])
            expected = sinkhorn(rows @ layer.weight.detach().T, epsilon=0.05)[-B:]
            torch.testing.assert_close(found[:, view], expected, rtol=1e-6, atol=1e-8)
        assert (found - alone(z, layer)).abs().max() > 1e-3


def test_queue_is_state_that_goes_on_where_it_stopped() -> None:
    codes, again = CodeMaker(D, size=5), CodeMaker(D, size=5)
    codes.push(unit(6, 2, D).float())
    again.load_state_dict(codes.state_dict())
    assert list(codes.state_dict()) == ["queue.keys", "queue.pointer"]
    layer, z = prototypes().float(), unit(B, 2, D).float()
    assert torch.equal(again(z, layer), codes(z, layer))
    assert CodeMaker(D).state_dict() == {}
    CodeMaker(D).push(z)  # without a queue there is nothing to push to


def codes_of_a_part(rank: int, world_size: int) -> Tensor:
    layer, codes = prototypes(), CodeMaker(D, size=7).double()
    codes.push(unit(9, 2, D, seed=4))
    mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
    return codes(unit(B, 2, D)[mine], layer)


def test_codes_on_ranks_are_those_of_the_whole_batch() -> None:
    """The queue is equal on all ranks, and every row of it counts once: seven rows on two ranks."""
    found = torch.cat(run_on_ranks(codes_of_a_part, 2, 2))
    torch.testing.assert_close(found, codes_of_a_part(0, 1), rtol=1e-11, atol=1e-13)


class Mean(nn.Module):
    """Means of channels; notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(tuple(images.shape))
        return images.mean((2, 3))


@pytest.mark.parametrize(("sides", "passes"), [((8, 4), [10, 15]), ((8, 8), [25]), ((8,), [10])])
def test_one_pass_for_each_size(sides: tuple[int, ...], passes: list[int]) -> None:
    net, generator = Mean(), torch.Generator().manual_seed(0)
    views = [torch.randn(2 + i, 5, 3, side, side, generator=generator) for i, side in enumerate(sides)]
    found = encode_views(net, views)
    assert [shape[0] for shape in net.given] == passes
    torch.testing.assert_close(found, torch.cat([view.mean((3, 4)) for view in views]))
