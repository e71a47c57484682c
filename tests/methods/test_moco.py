"""MoCo: heads, queue, moving average, symmetric loss, shuffle and groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mvmr.methods.moco import MoCo, MoCoConfig
from mvmr.ops.split_norm import SplitBatchNorm
from mvmr.types import Batch, Step, UserError
from ranks import run_on_ranks

STEP = Step(0, 10, 5)


def moco(**settings: Any) -> MoCo:
    """A small one: a linear map and a batch norm as the encoder."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    given = {"hidden": 9, "dim": 6, "queue": 20, "batch_norm_groups": 2, **settings}
    return MoCo(encoder, 10, MoCoConfig.model_validate(given))


def batch_of(images: int = 8, *, seed: int = 1) -> Batch:
    views = torch.randn(2, images, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Batch(torch.arange(images), {"global": views}, {})


def embedded(net: nn.Module, head: nn.Module, view: Tensor) -> Tensor:
    return functional.normalize(head(net(view)), dim=1)


def test_heads_are_the_papers() -> None:
    second = MoCo(nn.Identity(), 2048, MoCoConfig(batch_norm_groups=1, queue=8)).head
    assert [type(layer) for layer in second] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in second[::2]] == [(2048, 2048), (128, 2048)]
    assert all(layer.bias is not None for layer in second[::2])
    first = MoCo(nn.Identity(), 2048, MoCoConfig(head="linear", batch_norm_groups=1, queue=8)).head
    assert [type(layer) for layer in first] == [nn.Linear]
    assert tuple(first[0].weight.shape) == (128, 2048)
    assert first[0].bias is not None


def test_defaults_are_the_second_version_s() -> None:
    config = MoCoConfig()
    assert (config.dim, config.queue, config.temperature, config.momentum) == (128, 65536, 0.2, 0.999)
    assert (config.symmetric, config.batch_norm_groups, config.final_momentum) == (False, 8, None)
    assert (MoCo.base_lr, MoCo.loss_is_progress) == (0.03, False)
    for wrong in ({"momentum": 1.1}, {"temperature": 0}, {"queue": 0}, {"batch_norm_groups": 0}, {"tau": 0.1}):
        with pytest.raises(ValidationError):
            MoCoConfig.model_validate(wrong)


def test_loss_is_equation_1_of_its_own_queue() -> None:
    method, batch = moco(batch_norm_groups=1, temperature=0.3), batch_of()
    first, second = batch.views["global"]
    q = embedded(method.encoder, method.head, first)
    k = embedded(method.key_encoder, method.key_head, second)
    own, others = (q * k).sum(1) / 0.3, q @ method.queue.keys.T / 0.3
    expected = -(own - torch.logsumexp(torch.cat([own[:, None], others], 1), 1)).mean()
    terms = method.loss(batch, STEP)
    assert terms["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert terms["similarity"].item() == pytest.approx((q * k).sum(1).mean().item(), abs=1e-6)
    assert terms["accuracy"].item() == pytest.approx((own > others.amax(1)).float().mean().item())
    assert terms["z_std"].item() == pytest.approx(q.std(0, correction=0).mean().item(), abs=1e-6)


def test_symmetric_loss_is_the_mean_of_the_directions() -> None:
    both, one = moco(symmetric=True, batch_norm_groups=1), moco(batch_norm_groups=1)
    batch = batch_of()
    swapped = Batch(batch.index, {"global": batch.views["global"].flip(0)}, {})
    directions = [one.loss(x, STEP)["loss"].item() for x in (batch, swapped)]
    assert abs(directions[0] - directions[1]) > 1e-3
    assert both.loss(batch, STEP)["loss"].item() == pytest.approx(sum(directions) / 2, abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_are_enqueued_after_the_step(symmetric: bool) -> None:
    method, batch = moco(symmetric=symmetric, batch_norm_groups=1), batch_of()
    start = method.queue.keys.clone()
    first, second = (embedded(method.key_encoder, method.key_head, view) for view in batch.views["global"])
    method.loss(batch, STEP)
    assert torch.equal(method.queue.keys, start), "not while the loss is made"
    method.after_step(STEP)
    expected = torch.cat([second, first]) if symmetric else second
    torch.testing.assert_close(method.queue.keys[: len(expected)], expected)
    assert torch.equal(method.queue.keys[len(expected) :], start[len(expected) :])
    assert int(method.queue.pointer) == len(expected)
    method.after_step(STEP)
    assert int(method.queue.pointer) == len(expected), "each key once"


def test_keys_of_an_accumulated_step_are_all_enqueued() -> None:
    method = moco()
    for seed in (1, 2):
        method.loss(batch_of(seed=seed), STEP)
    method.after_step(STEP)
    assert int(method.queue.pointer) == 16


def moved(method: MoCo, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(key network's start, its end, the query network) for every parameter, the query network standing still."""
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.head.parameters()):
            parameter.add_(1.0)
    keys = [*method.key_encoder.parameters(), *method.key_head.parameters()]
    start = [parameter.clone() for parameter in keys]
    for number in range(steps):
        method.after_step(Step(number, steps, 1))
    online = [*method.encoder.parameters(), *method.head.parameters()]
    return list(zip(start, keys, online, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_moving_average_of_a_constant_network(momentum: float) -> None:
    for start, end, online in moved(moco(momentum=momentum), 5):
        share = momentum**5  # Eq. 2 five times
        torch.testing.assert_close(end, share * start + (1 - share) * online)
        if momentum in (0.0, 1.0):
            assert torch.equal(end, start if momentum else online), "frozen, or a copy"


def test_momentum_follows_a_half_cosine_to_its_last_value() -> None:
    share = 1.0
    for number in range(5):
        share *= 1.0 - (1.0 - 0.5) * (1 + math.cos(math.pi * number / 4)) / 2
    for start, end, online in moved(moco(momentum=0.5, final_momentum=1.0), 5):
        torch.testing.assert_close(end, share * start + (1 - share) * online)


def test_start_of_the_key_network_and_who_is_trained() -> None:
    method = moco()
    online = [*method.encoder.named_parameters(), *method.head.named_parameters()]
    keys = [*method.key_encoder.named_parameters(), *method.key_head.named_parameters()]
    for (name, parameter), (key_name, key) in zip(online, keys, strict=True):
        assert name == key_name
        assert torch.equal(parameter, key)
        assert parameter is not key
    method.loss(batch_of(), STEP)["loss"].backward()
    assert all(parameter.grad is not None for _, parameter in online)
    assert all(parameter.grad is None and not parameter.requires_grad for _, parameter in keys)
    assert method.exported() is method.encoder


def test_statistics_of_the_key_network_are_its_own() -> None:
    method, batch = moco(momentum=0.0), batch_of()
    method.loss(batch, STEP)
    method.after_step(STEP)
    ours, theirs = method.encoder[2].running_mean, method.key_encoder[2].running_mean
    assert not torch.equal(ours, theirs)
    assert ours.abs().sum() > 0
    assert theirs.abs().sum() > 0


def test_groups_and_shuffle_hide_the_pair_in_batch_norm() -> None:
    """Query and key of one image and one view: equal where their batch statistics are, else not."""
    view = batch_of().views["global"][:1]
    batch = Batch(torch.arange(8), {"global": view.expand(2, -1, -1, -1, -1)}, {})
    whole, groups = moco(batch_norm_groups=1), moco(batch_norm_groups=2)
    torch.manual_seed(5)
    assert whole.loss(batch, STEP)["similarity"].item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(torch.randperm(8), torch.randperm(8, generator=torch.Generator().manual_seed(5))), "not drawn"
    assert groups.loss(batch, STEP)["similarity"].item() < 1 - 1e-3
    parts = groups.embed(batch)["query"][0].chunk(2)
    for part, rows in zip(parts, view[0].chunk(2), strict=True):
        plain = moco(batch_norm_groups=1)
        torch.testing.assert_close(part, embedded(plain.encoder, plain.head, rows))


def test_keys_come_back_in_the_images_order() -> None:
    """Without batch norm in the way, a shuffle that is undone changes nothing."""
    method, batch = moco(batch_norm_groups=2), batch_of()
    method.key_encoder.eval()  # running statistics: every image for itself
    expected = embedded(method.key_encoder, method.key_head, batch.views["global"][1])
    torch.testing.assert_close(method.embed(batch)["key"][0], expected)


def test_network_without_batch_norm_needs_no_groups() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.LayerNorm(10))
    method = MoCo(encoder, 10, MoCoConfig(dim=6, queue=20))
    assert method.loss(batch_of(3), STEP)["loss"].isfinite(), "three images are no multiple of eight groups"


def test_state_goes_to_a_network_with_plain_batch_norm() -> None:
    method = moco()
    method.loss(batch_of(), STEP)
    method.after_step(STEP)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    plain.load_state_dict(method.exported().state_dict())
    x = batch_of(3).views["global"][0]
    torch.testing.assert_close(plain.eval()(x), method.exported().eval()(x))
    assert isinstance(method.encoder[2], SplitBatchNorm)
    again = moco()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.queue.keys, method.queue.keys)
    assert int(again.queue.pointer) == 8


@pytest.mark.parametrize(("images", "groups"), [(8, 3), (8, 8), (5, 2)])
def test_groups_that_do_not_cut_the_batch_are_refused(images: int, groups: int) -> None:
    with pytest.raises(UserError, match=rf"method\.batch_norm_groups={groups} does not cut a batch of {images}.*data"):
        moco(batch_norm_groups=groups).loss(batch_of(images), STEP)


def two_steps(rank: int, ranks: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and buffers after two steps of plain descent on this rank's part of two batches, and the losses."""
    torch.set_num_threads(1)
    method, losses = moco(**settings).double(), []
    for number in range(2):
        views = batch_of(seed=number).views["global"].double().chunk(ranks, 1)[rank]
        torch.manual_seed(10 * number + rank)
        method.zero_grad()
        loss = method.loss(Batch(torch.arange(8), {"global": views}, {}), STEP)["loss"]
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    if ranks > 1:
                        torch.distributed.all_reduce(parameter.grad)
                    parameter.sub_(0.5 * parameter.grad / ranks)
        method.after_step(STEP)
    return {name: value.clone() for name, value in method.state_dict().items()}, losses


def test_two_ranks_take_the_steps_of_one() -> None:
    settings = {"symmetric": True, "queue": 11, "momentum": 0.5}
    expected, losses = two_steps(0, 1, settings)
    results = run_on_ranks(two_steps, 2, 2, settings)
    for state, _ in results:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert [sum(pair) / 2 for pair in zip(*(found for _, found in results), strict=True)] == pytest.approx(losses)


def three_groups_on_two_ranks(rank: int) -> str:
    with pytest.raises(UserError) as error:
        moco(batch_norm_groups=3).loss(batch_of(6), STEP)
    return str(error.value)


def test_devices_that_do_not_divide_the_groups_are_refused() -> None:
    for message in run_on_ranks(three_groups_on_two_ranks, 2):
        assert "method.batch_norm_groups=3 cannot be shared by 2 devices: take a multiple of 2, or 1" in message
