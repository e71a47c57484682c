"""Moving averages of networks against their closed form, at their limits, and what they leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mvmr.ops.ema import follow, follower


def net(seed: int = 0, *, width: int = 4) -> nn.Sequential:
    """A small network with weights, biases, batch norm's parameters and its buffers, all away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2, bias=False)).double()
    with torch.no_grad():
        for tensor in (*module.parameters(), module[1].running_mean, module[1].running_var):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("momentum", [0.9, 0.996, 0.5])
def test_a_constant_net_is_approached_along_a_power_of_the_momentum(momentum: float) -> None:
    """average_k = momentum^k average_0 + (1 - momentum^k) net."""
    online, average = net(0), net(1).requires_grad_(False)
    start, goal = values(average), values(online)
    for step in range(1, 31):
        follow(average, online, momentum)
        for first, last, now in zip(start, goal, values(average), strict=True):
            torch.testing.assert_close(now, momentum**step * first + (1 - momentum**step) * last, rtol=0, atol=1e-13)
    for before, after in zip(goal, values(online), strict=True):
        assert torch.equal(before, after), "the net that is followed does not move"


def test_one_step_by_hand() -> None:
    online, average = nn.Linear(1, 1), follower(nn.Linear(1, 1))
    for module, weight, bias in ((online, 3.0, -1.0), (average, 1.0, 7.0)):
        with torch.no_grad():
            module.weight.fill_(weight)
            module.bias.fill_(bias)
    follow(average, online, 0.75)
    assert average.weight.item() == 1.5  # 0.75 x 1 + 0.25 x 3
    assert average.bias.item() == 5.0  # 0.75 x 7 - 0.25 x 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_one_keeps_and_zero_copies_exactly(dtype: torch.dtype) -> None:
    online, average = net(0).to(dtype), net(1).to(dtype)
    start = values(average)
    follow(average, online, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(start, values(average), strict=True))
    follow(average, online, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(values(online), values(average), strict=True))


def test_buffers_are_left_alone() -> None:
    online, average = net(0), net(1)
    before = {name: buffer.clone() for name, buffer in average.named_buffers()}
    assert before
    follow(average, online, 0.0)
    for name, buffer in average.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert name.endswith("num_batches_tracked") or not torch.equal(buffer, online.get_buffer(name)), name


def test_a_follower_starts_as_a_copy_of_its_own() -> None:
    online = net(0)
    average = follower(online)
    assert all(p.requires_grad for p in online.parameters())
    assert not any(p.requires_grad for p in average.parameters())
    assert average.state_dict().keys() == online.state_dict().keys()
    for name, value in online.state_dict().items():
        assert torch.equal(value, average.state_dict()[name]), name
        assert value.data_ptr() != average.state_dict()[name].data_ptr(), name
    average(torch.randn(8, 3, dtype=torch.float64))  # in train mode: its own statistics
    assert not torch.equal(average[1].running_mean, online[1].running_mean)


def test_frozen_parameters_are_followed_too() -> None:
    """What is frozen in the net is equal in its copy, and stays so; an average of another start still goes there."""
    online = net(0)
    online[0].requires_grad_(False)
    average = follower(online)
    with torch.no_grad():
        online[2].weight.add_(1.0)
    follow(average, online, 0.9)
    assert torch.equal(average[0].weight, online[0].weight)
    torch.testing.assert_close(online[2].weight - average[2].weight, torch.full((2, 4), 0.9, dtype=torch.float64))
    other = net(1)
    follow(other, online, 0.0)
    assert torch.equal(other[0].weight, online[0].weight)
    assert [p.requires_grad for p in online.parameters()] == [False, False, True, True, True]


def test_no_graph_is_kept() -> None:
    online, average = net(0), net(1)  # parameters of both need gradients
    follow(average, online, 0.5)
    assert all(p.is_leaf and p.grad is None for p in (*average.parameters(), *online.parameters()))


def test_float32_loses_no_more_than_rounding() -> None:
    """At 0.9999 an update is the size of float32's rounding; a thousand of them must still add up."""
    online, average = net(0), net(1)
    rough_online, rough = copy.deepcopy(online).float(), copy.deepcopy(average).float()
    for _ in range(1000):
        follow(average, online, 0.9999)
        follow(rough, rough_online, 0.9999)
    for exact, value in zip(values(average), values(rough), strict=True):
        assert (value.double() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_outside_its_range_is_refused(momentum: float) -> None:
    average = net(1)
    before = values(average)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        follow(average, net(0), momentum)
    assert all(torch.equal(a, b) for a, b in zip(before, values(average), strict=True))


@pytest.mark.parametrize("other", [net(0, width=5), nn.Sequential(nn.Linear(3, 4)).double()])
def test_another_architecture_is_refused(other: nn.Module) -> None:
    average = net(1)
    before = values(average)
    with pytest.raises(ValueError, match="different parameters"):
        follow(average, other, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, values(average), strict=True))


def test_a_follower_drops_no_branch() -> None:
    from timm.layers import DropPath

    net = nn.Sequential(nn.Linear(3, 3), DropPath(0.9)).train()
    x = torch.ones(64, 3)
    average = follower(net)
    assert average.training
    torch.testing.assert_close(average(x), net[0](x))
    assert net[1].drop_prob == 0.9
