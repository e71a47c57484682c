"""Randomness as a function: Philox4x32-10 in vectorised integer arithmetic, with no state anywhere.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, Section 3.3 and Table 2. Every word
depends on (key, counter) alone, and integer arithmetic is exact, so a CPU, a GPU, a worker process and a restarted run
all draw the same numbers, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PERMUTATION_STREAM", "permutation", "philox", "step_seed", "uniform"]

PERMUTATION_STREAM = 0xFFFFFFFF
"""The stream of `permutation`; the streams of views are small numbers."""

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1
_WORD = 0xFFFFFFFF
_HALF = 0xFFFF
_CHUNK = 1 << 15  # counters worked on at a time: intermediate words stay in the cache


def philox(counter: Tensor, key: Tensor | tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon et al., Section 3.3): 128 random bits of each counter.

    counter: [..., 4] int64 holding 32-bit words. key: two 32-bit words, as numbers or as int64 [..., 2], broadcast
    against the counters. Returns [..., 4] int64 in [0, 2^32), on the counter's device.
    """
    if counter.dtype != torch.int64 or counter.shape[-1:] != (4,):
        raise ValueError(f"counter must be int64 of shape [..., 4], not {counter.dtype} of {tuple(counter.shape)}")
    keys = key.unbind(-1) if isinstance(key, Tensor) else key
    k0, k1 = keys[0] & _WORD, keys[1] & _WORD
    c0, c1, c2, c3 = counter.bitwise_and(_WORD).unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(seed: int, epoch: int, index: Tensor, stream: int | Tensor, draws: int) -> Tensor:
    """Numbers in the open interval (0, 1), multiples of 2^-33, as a pure function of the arguments.

    Key (seed, epoch), counter (index low, index high, stream, block): the n-th draw of an index never depends on how
    many are asked for, nor on the other indices. seed: 64 bits count (the upper half enters the index's upper word,
    which has nothing else than how often an image came before); epoch and stream: 32 bits. index: int64 [B], or any
    shape that broadcasts with `stream`. Returns float64 [B, draws] on the index's device.
    """
    if isinstance(stream, Tensor):
        index, stream = torch.broadcast_tensors(index, stream)
    words = _words(seed, epoch, index, stream, blocks=-(-draws // 4))  # [B, 4 * blocks]
    return words[..., :draws].to(torch.float64).add_(0.5).mul_(2.0**-32)


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A shuffle of 0 ... n-1 that is a pure function of (seed, epoch).

    Sorts 63-bit random keys (ties, of chance about n^2 / 2^64, stay in order). Returns int64 [n] on the CPU.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    keys = torch.empty(n, dtype=torch.int64)
    for start in range(0, n, 2 * _CHUNK):  # one counter serves two positions
        stop = min(n, start + 2 * _CHUNK)
        counters = torch.arange(start // 2, (stop + 1) // 2)
        words = _words(seed, epoch, counters, PERMUTATION_STREAM, blocks=1).view(-1, 2)
        keys[start:stop] = ((words[:, 0] << 31) | (words[:, 1] >> 1))[: stop - start]
    return torch.argsort(keys, stable=True)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed in [0, 2^63) of what a method draws at a step on a rank, so that a resumed run draws the same."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % (1 << 63)


def _words(seed: int, epoch: int, index: Tensor, stream: int | Tensor, *, blocks: int) -> Tensor:
    """32-bit words [..., 4 * blocks] of every index."""
    if index.dtype != torch.int64:
        raise ValueError(f"index must be int64, not {index.dtype}")
    counter = torch.empty((*index.shape, blocks, 4), dtype=torch.int64, device=index.device)
    counter[..., 0] = index.unsqueeze(-1)
    counter[..., 1] = (index >> 32).bitwise_xor_((seed >> 32) & _WORD).unsqueeze(-1)
    counter[..., 2] = stream.unsqueeze(-1) if isinstance(stream, Tensor) else stream
    counter[..., 3] = torch.arange(blocks, device=index.device)
    return philox(counter, (seed & _WORD, epoch & _WORD)).flatten(-2)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product, by halves of the multiplier so that int64 never overflows."""
    lower = word * (multiplier & _HALF)  # < 2^48
    upper = (word * (multiplier >> 16)).add_(lower >> 16)  # < 2^49
    low = upper.bitwise_and(_HALF).bitwise_left_shift_(16).bitwise_or_(lower.bitwise_and_(_HALF))
    return upper >> 16, low
