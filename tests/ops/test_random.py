from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from mvmr.ops.random import permutation, philox, step_seed, uniform

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # from Random123's kat_vectors, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_with_python_integers(counter: list[int], key: tuple[int, int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & ONES, (first >> 32) ^ c[3] ^ k[1], first & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return c


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert philox(torch.tensor(counter), key).tolist() == list(words)
    assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == list(words)


def test_philox_equals_unbounded_integers():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (50, 4), generator=generator)
    keys = torch.randint(0, 2**32, (50, 2), generator=generator)
    expected = [
        philox_with_python_integers(c, (k[0], k[1])) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)
    ]
    assert philox(counters, keys).tolist() == expected


@pytest.mark.gpu
def test_words_are_the_same_on_a_gpu():
    index = torch.arange(10_000) * 7919
    on_cpu, on_gpu = uniform(3, 5, index, 1, 6), uniform(3, 5, index.cuda(), 1, 6)
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("counter", [torch.zeros(4), torch.zeros(3, dtype=torch.int64)])
def test_philox_refuses_other_counters(counter: Tensor):
    with pytest.raises(ValueError, match="int64 of shape"):
        philox(counter, (0, 0))


def test_uniform_reads_the_documented_words():
    index, seed = 5 + (7 << 32), 11 + (13 << 32)
    words = philox(torch.tensor([5, 7 ^ 13, 2, 1]), (11, 3)).double()  # block 1: draws 4 to 7
    assert torch.equal(uniform(seed, 3, torch.tensor([index]), 2, 8)[0, 4:], (words + 0.5) / 2**32)


def test_uniform_depends_on_every_argument_and_on_nothing_else():
    index = torch.tensor([4, 9, 4, 10**12])
    draws = uniform(1, 2, index, 3, 10)
    assert draws.shape == (4, 10)
    assert draws.dtype == torch.float64
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(uniform(1, 2, index[[3]], 3, 5)[0], draws[3, :5])
    for other in (
        uniform(2, 2, index, 3, 10),
        uniform(1 + 2**32, 2, index, 3, 10),
        uniform(1, 3, index, 3, 10),
        uniform(1, 2, index + 1, 3, 10),
        uniform(1, 2, index + 2**32, 3, 10),
        uniform(1, 2, index, 4, 10),
    ):
        assert not torch.isclose(other, draws).any()


def test_uniform_takes_a_tensor_of_streams():
    index = torch.arange(5)
    both = uniform(0, 0, index, torch.tensor([[0], [6]]), 7)  # [2, 5, 7]
    assert torch.equal(both[0], uniform(0, 0, index, 0, 7))
    assert torch.equal(both[1], uniform(0, 0, index, 6, 7))


def test_uniform_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    uniform(0, 0, torch.arange(10), 0, 4)
    permutation(0, 0, 10)
    assert torch.equal(before, torch.random.get_rng_state())


def test_uniform_numbers_are_uniform_and_unrelated():
    draws = uniform(0, 0, torch.arange(20_000), 0, 8)
    assert draws.min() > 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    following = uniform(0, 1, torch.arange(20_000), 0, 8)
    together = torch.cat([draws, following], 1)
    correlations = torch.corrcoef(together.T) - torch.eye(16)
    assert correlations.abs().max() < 5 / 20_000**0.5


def test_uniform_refuses_a_float_index():
    with pytest.raises(ValueError, match="int64"):
        uniform(0, 0, torch.zeros(3), 0, 1)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 65_536, 70_001])
def test_permutation_names_every_position_once(n: int):
    order = permutation(3, 1, n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutation_is_a_function_of_seed_and_epoch():
    assert torch.equal(permutation(1, 2, 1000), permutation(1, 2, 1000))
    for other in (permutation(1, 3, 1000), permutation(2, 2, 1000)):
        assert (other == permutation(1, 2, 1000)).sum() < 10  # about one by chance


def test_permutation_is_fair():
    orders = torch.stack([permutation(0, epoch, 5) for epoch in range(600)])
    for place in range(5):
        assert stats.chisquare(torch.bincount(orders[:, place], minlength=5).numpy()).pvalue > 1e-4


def test_permutation_refuses_negative_lengths():
    with pytest.raises(ValueError, match="negative"):
        permutation(0, 0, -1)


def test_step_seed_differs_in_every_argument_and_fits_a_generator():
    seeds = {step_seed(*where) for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (7, 10**6, 63)]}
    assert len(seeds) == 6
    for seed in seeds:
        torch.Generator().manual_seed(seed)
