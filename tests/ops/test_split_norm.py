"""Batch norm in groups against one nn.BatchNorm a group, on one process and on ranks; and the shuffle of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mvmr.ops.batch_norm import synchronise_batch_norm
from mvmr.ops.split_norm import SplitBatchNorm, shuffled, split_batch_norm, unshuffled
from mvmr.types import UserError
from ranks import run_on_ranks

GROUPS = 4
Options = tuple[tuple[int, ...], bool, float | None, bool]
OPTIONS: list[Options] = [((12, 3), True, 0.1, True), ((8, 3, 4, 5), False, None, True), ((8, 3, 4), True, 0.1, False)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_norm(options: Options) -> nn.Module:
    shape, affine, momentum, track = options
    kind = nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d
    norm = kind(shape[1], eps=1e-3, momentum=momentum, affine=affine, track_running_stats=track).double()
    if affine:
        nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(7))
        nn.init.normal_(norm.bias, 0, 0.3, generator=torch.Generator().manual_seed(8))
    return norm


def step(norm: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, input gradient and parameter gradients of one training step."""
    x = x.clone().requires_grad_()
    norm.zero_grad()
    output = norm(x)
    (output**3 * weights).sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in norm.parameters())]


def expected_step(options: Options, x: Tensor, weights: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
    """The same by a nn.BatchNorm of its own for each group of rows, from equal weights; and these norms."""
    norms = [plain_norm(options) for _ in range(GROUPS)]
    parts = [step(norm, *rows) for norm, *rows in zip(norms, x.chunk(GROUPS), weights.chunk(GROUPS), strict=True)]
    columns = list(zip(*parts, strict=True))
    return [torch.cat(columns[0]), torch.cat(columns[1]), *(sum(column) for column in columns[2:])], norms


@pytest.mark.parametrize("options", OPTIONS)
def test_one_process_equals_a_norm_a_group(options: Options) -> None:
    x, weights = normal(*options[0]) * 3 + 100, normal(*options[0], seed=1)
    expected, norms = expected_step(options, x, weights)
    ours = split_batch_norm(plain_norm(options), GROUPS)
    for found, value in zip(step(ours, x, weights), expected, strict=True):
        assert torch.allclose(found, value, rtol=0, atol=1e-10)
    assert list(ours.state_dict()) == list(norms[0].state_dict())
    for name, buffer in ours.named_buffers():
        mean = torch.stack([norm.state_dict()[name] for norm in norms]).double().mean(0)
        assert torch.allclose(buffer.double(), mean, rtol=0, atol=1e-12), name
    whole = normal(*options[0]) * 9
    assert not torch.allclose(split_batch_norm(plain_norm(options), 1)(whole), ours(whole)), "groups make a difference"


@pytest.mark.parametrize("options", OPTIONS)
def test_one_group_and_eval_mode_are_plain(options: Options) -> None:
    x, weights = normal(*options[0]) * 3 + 1, normal(*options[0], seed=1)
    plain, ours = plain_norm(options), split_batch_norm(plain_norm(options), 1)
    for found, value in zip(step(ours, x, weights), step(plain, x, weights), strict=True):
        assert torch.equal(found, value)
    ours.groups = 3  # does not count in eval mode
    assert torch.allclose(ours.eval()(x), plain.eval()(x), rtol=0, atol=1e-12)


def norm_on_ranks(rank: int, options: Options, x: Tensor, weights: Tensor, ranks: int) -> tuple[list, list]:
    ours = split_batch_norm(plain_norm(options), GROUPS)
    found = step(ours, x.chunk(ranks)[rank], weights.chunk(ranks)[rank])
    return found, [buffer.clone() for buffer in ours.buffers()]


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_groups(options: Options, ranks: int) -> None:
    x, weights = normal(*options[0]) * 3 + 100, normal(*options[0], seed=1)
    ours = split_batch_norm(plain_norm(options), GROUPS)
    expected = step(ours, x, weights)
    results = run_on_ranks(norm_on_ranks, ranks, options, x, weights, ranks)
    for position, value in enumerate(expected):
        parts = [found[position] for found, _ in results]
        whole = torch.cat(parts) if position < 2 else sum(parts)  # parameters: DDP's mean, times W
        assert torch.allclose(whole, value, rtol=0, atol=1e-10)
    for _, buffers in results:
        for found, buffer in zip(buffers, ours.buffers(), strict=True):
            assert torch.allclose(found, buffer, rtol=0, atol=1e-12)


def shuffle_on_ranks(rank: int, x: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rank)  # rank 0's draw is everybody's
    mine = x.chunk(ranks)[rank]
    mixed, order = shuffled(mine)
    assert torch.equal(unshuffled(mixed, order), mine)
    return mixed, order, unshuffled(10 * mixed + 1, order)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shuffle_is_undone_and_the_same_on_all_ranks(ranks: int) -> None:
    x = normal(8, 3)
    torch.manual_seed(0)
    expected = torch.randperm(8)
    results = run_on_ranks(shuffle_on_ranks, ranks, x, ranks) if ranks > 1 else [shuffle_on_ranks(0, x, 1)]
    assert torch.equal(torch.cat([mixed for mixed, _, _ in results]), x[expected])
    assert all(torch.equal(order, expected) for _, order, _ in results)
    assert not torch.equal(expected, torch.arange(8))
    assert torch.equal(torch.cat([undone for _, _, undone in results]), 10 * x + 1)


def test_synchronising_leaves_it_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 3), split_batch_norm(nn.BatchNorm1d(3), 2), nn.BatchNorm1d(3))
    split = module[1]
    assert synchronise_batch_norm(module)[1] is split
    assert type(module[2]) is not nn.BatchNorm1d
    assert nn.SyncBatchNorm.convert_sync_batchnorm(module)[1] is split, "nor does torch's own, used on a GPU"


def test_timm_activations_are_kept() -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Hardtanh)  # a "dropout" whose effect is sure
    x = normal(4, 3, 2, 2).float()
    expected = torch.cat([copy.deepcopy(norm)(part) for part in x.chunk(2)])
    module = split_batch_norm(nn.Sequential(norm), 2)
    assert isinstance(module[0], SplitBatchNorm)
    assert torch.allclose(module(x), expected, rtol=0, atol=1e-6)


def test_channels_last_and_bfloat16() -> None:
    x = normal(8, 3, 4, 4).float().contiguous(memory_format=torch.channels_last)
    norm, same = SplitBatchNorm(3, 2), SplitBatchNorm(3, 2)
    output = norm(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, same(x.contiguous()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = norm(x.bfloat16() + 200)
    assert rough.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.float32
    halves = [(x.bfloat16() + 200).float()[rows].var((0, 2, 3)) for rows in (slice(4), slice(4, 8))]
    expected = 0.9 * same.running_var + 0.1 * (halves[0] + halves[1]) / 2
    torch.testing.assert_close(norm.running_var, expected, rtol=1e-4, atol=0)


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"2 groups cannot be shared by 1 rank.* of 5 images"):
        SplitBatchNorm(3, 2)(torch.zeros(5, 3))
    assert split_batch_norm(nn.BatchNorm1d(4, momentum=None, eps=0.1), 2).groups == 2
    with pytest.raises(ValueError, match="groups is 0"):
        SplitBatchNorm(3, 0)

    class OwnNorm(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match=r"OwnNorm.*method\.batch_norm_groups=1"):
        split_batch_norm(nn.Sequential(OwnNorm(3)), 2)


def three_groups(rank: int) -> str:
    with pytest.raises(ValueError, match="the ranks must divide the groups") as error:
        SplitBatchNorm(3, 3)(torch.zeros(6, 3))
    return str(error.value)


def test_ranks_that_do_not_divide_the_groups_are_refused() -> None:
    assert all("3 groups cannot be shared by 2 rank" in message for message in run_on_ranks(three_groups, 2))
