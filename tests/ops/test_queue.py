"""The queue of keys: order, wrap-around, start and state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvmr.ops.queue import Queue


def numbered(first: int, count: int) -> Tensor:
    """Keys that can be told apart: [count, 2] of first, first + 1, ..."""
    return torch.arange(first, first + count).float()[:, None].expand(count, 2)


def held(queue: Queue) -> list[int]:
    """The numbers of the keys in the queue, oldest first."""
    return queue.keys.roll(-int(queue.pointer), 0)[:, 0].int().tolist()


@pytest.mark.parametrize("pushes", [[3, 3, 3, 3], [4, 4], [8], [1] * 19, [5, 7, 2, 6], [20], [3, 9, 25, 2], [0, 8, 0]])
def test_it_holds_the_last_keys_in_their_order(pushes: list[int]) -> None:
    queue, told = Queue(8, 2), 0
    history: list[int] = []
    for count in pushes:
        queue.push(numbered(told, count))
        history += range(told, told + count)
        told += count
        fresh = history[-8:]
        assert held(queue)[8 - len(fresh) :] == fresh
        assert int(queue.pointer) == told % 8


def test_a_push_replaces_the_oldest_and_leaves_the_others() -> None:
    queue = Queue(5, 2)
    before = queue.keys.clone()
    queue.push(numbered(10, 2))
    assert queue.keys[:, 0].int()[:2].tolist() == [10, 11]
    assert torch.equal(queue.keys[2:], before[2:])
    queue.push(numbered(12, 4))  # wraps: slots 2, 3, 4 and 0
    assert queue.keys[:, 0].int().tolist() == [15, 11, 12, 13, 14]
    assert len(queue) == 5


def test_it_starts_with_random_unit_vectors_of_the_seed() -> None:
    torch.manual_seed(3)
    queue = Queue(200, 16)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(200))
    assert queue.keys.mean(0).abs().max() < 0.1, "in all directions"
    torch.manual_seed(3)
    assert torch.equal(Queue(200, 16).keys, queue.keys)
    assert not torch.equal(Queue(200, 16).keys, queue.keys)


def test_state_is_two_buffers_that_go_on_where_they_stopped() -> None:
    queue, again = Queue(6, 2), Queue(6, 2)
    queue.push(numbered(0, 4))
    assert list(queue.state_dict()) == ["keys", "pointer"]
    assert list(queue.parameters()) == []
    again.load_state_dict(queue.state_dict())
    for one in (queue, again):
        one.push(numbered(4, 5))
    assert held(again) == held(queue) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_it_keeps_float32_and_no_gradient(dtype: torch.dtype) -> None:
    queue = Queue(4, 2)
    queue.push(numbered(1, 3).to(dtype).requires_grad_())
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad
    assert queue.keys[:3, 0].tolist() == [1, 2, 3]


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"keys \[n, 2\], not \[3, 4\]"):
        Queue(4, 2).push(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least 1, not 0 and 2"):
        Queue(0, 2)


def test_keys_that_are_not_finite_become_zeros() -> None:
    queue = Queue(4, 2)
    queue.push(torch.tensor([[torch.nan, 1.0], [torch.inf, 2.0]]))
    assert queue.keys[:2].tolist() == [[0.0, 1.0], [0.0, 2.0]]
