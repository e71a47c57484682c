"""Sinkhorn against loops over its definition, POT's solvers of the same problem, and exact transport."""

from __future__ import annotations

import math
from typing import Any

import ot as pot  # codespell:ignore
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvmr.errors import RunError
from mvmr.ops.sinkhorn import Potentials, plan, plan_labels, sinkhorn, transport
from ranks import run_on_ranks

N, K = 24, 7


def cosines(rows: int = N, columns: int = K, *, seed: int = 0, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z, c = (normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1) for n in (rows, columns))
    return z @ c.T


def log_probabilities(rows: int = N, columns: int = K, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64), dim=1)


def slow(scores: Tensor, epsilon: float, iterations: int, *, prototypes_first: bool = True) -> list[list[float]]:
    """The iterations as the paper describes them, number by number, on plain exponentials."""
    rows, columns = scores.shape
    q = [[math.exp(float(s) / epsilon) for s in row] for row in scores]

    def even_columns() -> None:
        for k in range(columns):
            total = sum(q[b][k] for b in range(rows))
            for b in range(rows):
                q[b][k] /= total * columns

    def even_rows() -> None:
        for b in range(rows):
            total = sum(q[b])
            q[b] = [value / (total * rows) for value in q[b]]

    for _ in range(iterations):
        for step in (even_columns, even_rows) if prototypes_first else (even_rows, even_columns):
            step()
    return [[value * rows for value in row] for row in q]


def by_pot(scores: Tensor, epsilon: float, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    n, k = scores.shape
    a = torch.full((n,), 1 / n, dtype=torch.float64) if rows is None else rows
    b = torch.full((k,), 1 / k, dtype=torch.float64) if columns is None else columns
    found: Any = pot.sinkhorn(
        a.numpy(), b.numpy(), -scores.numpy(), reg=epsilon, method="sinkhorn_log", stopThr=1e-14, numItermax=20_000
    )
    return torch.from_numpy(found)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.5])
def test_equals_a_loop_over_the_definition(epsilon: float, iterations: int) -> None:
    scores = cosines()
    found = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    expected = torch.tensor(slow(scores, epsilon, iterations), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.sum(1), torch.ones(N, dtype=torch.float64), rtol=1e-13, atol=0)


def test_prototypes_come_before_images() -> None:
    """The order of the released code: the other one ends with even prototypes, not with rows that sum to 1."""
    scores = cosines()
    other = torch.tensor(slow(scores, 0.05, 3, prototypes_first=False), dtype=torch.float64)
    assert (other.sum(0) - N / K).abs().max() < 1e-12
    assert (other.sum(1) - 1).abs().max() > 1e-3
    assert (sinkhorn(scores, epsilon=0.05) - other).abs().max() > 1e-3


@pytest.mark.parametrize(("epsilon", "three"), [(0.05, 0.005), (0.03, 0.03)])
def test_limit_is_pots(epsilon: float, three: float) -> None:
    scores = cosines(64, 300, dim=128)
    limit = by_pot(scores, epsilon) * 64
    assert (sinkhorn(scores, epsilon=epsilon, iterations=1000) - limit).abs().max() < 1e-11
    after_three = sinkhorn(scores, epsilon=epsilon)
    assert 1e-5 < (after_three - limit).abs().max() < three  # three iterations are near it, and not more
    assert (after_three.sum(0) / (64 / 300) - 1).abs().max() < 0.1  # so are the prototypes' shares


def test_equal_scores_give_uniform_codes() -> None:
    for value in (0.0, 3.0, -50.0):
        q = sinkhorn(torch.full((5, 4), value), epsilon=0.05)
        torch.testing.assert_close(q, torch.full((5, 4), 0.25))


def test_order_of_images_and_prototypes_is_kept() -> None:
    scores, q = cosines(), sinkhorn(cosines(), epsilon=0.05)
    images = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    prototypes = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(sinkhorn(scores[images][:, prototypes], epsilon=0.05), q[images][:, prototypes])
    # What is added to a whole prototype's scores is dealt out again.
    torch.testing.assert_close(sinkhorn(scores + torch.linspace(-1, 1, K), epsilon=0.05), q, rtol=1e-8, atol=1e-10)


def test_nothing_overflows_or_vanishes() -> None:
    scores = cosines(8, 40).float()
    for epsilon in (0.05, 0.003, 1e-5):  # exp(1 / 0.0113) is the greatest that float32 has
        q = sinkhorn(scores, epsilon=epsilon)
        assert q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones(8))
    torch.testing.assert_close(
        sinkhorn(scores, epsilon=0.003).double(), sinkhorn(scores.double(), epsilon=0.003), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores = cosines().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        q = sinkhorn(scores, epsilon=0.05)
    assert q.dtype == torch.float32
    assert not q.requires_grad
    torch.testing.assert_close(q.double(), sinkhorn(scores.double(), epsilon=0.05).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    scores = cosines()
    torch.testing.assert_close(
        sinkhorn(scores, epsilon=0.05, chunk=chunk), sinkhorn(scores, epsilon=0.05), rtol=1e-12, atol=1e-14
    )
    whole, parts = (transport(scores, epsilon=0.05, tolerance=1e-8, chunk=c) for c in (None, chunk))
    torch.testing.assert_close(parts.rows, whole.rows, rtol=1e-11, atol=1e-11)
    assert parts.iterations == whole.iterations
    labels = plan_labels(scores, whole, epsilon=0.05, chunk=chunk)
    assert torch.equal(labels, plan(scores, whole, epsilon=0.05).argmax(1))


def of_a_shard(rank: int, bounds: list[int]) -> tuple[Tensor, Potentials]:
    mine = slice(bounds[rank], bounds[rank + 1])
    scores, masses = cosines()[mine], torch.linspace(1, 2, N, dtype=torch.float64)
    log_mass = (masses / masses.sum()).log()[mine]
    return sinkhorn(scores, epsilon=0.05), transport(scores, epsilon=0.1, tolerance=1e-9, log_row_mass=log_mass)


@pytest.mark.parametrize("bounds", [[0, 12, 24], [0, 5, 24], [0, 0, 24]])
def test_ranks_solve_the_problem_of_all_rows(bounds: list[int]) -> None:
    """Sums, not per-rank ones: shards of any sizes give what one process with all rows gets."""
    q, whole = of_a_shard(0, [0, N])
    found = run_on_ranks(of_a_shard, len(bounds) - 1, bounds)
    torch.testing.assert_close(torch.cat([codes for codes, _ in found]), q, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.cat([p.rows for _, p in found]), whole.rows, rtol=1e-11, atol=1e-11)
    for _, potentials in found:
        assert torch.equal(potentials.columns, found[0][1].columns)
        assert potentials.iterations == whole.iterations
        assert potentials.violation == pytest.approx(whole.violation, rel=1e-3, abs=1e-13)


def test_transport_is_pots_for_any_masses() -> None:
    scores = cosines()
    rows = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    columns = torch.rand(K, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
    rows, columns = rows / rows.sum(), columns / columns.sum()
    found = transport(scores, epsilon=0.05, tolerance=1e-12, log_row_mass=rows.log(), log_column_mass=columns.log())
    q = plan(scores, found, epsilon=0.05)
    torch.testing.assert_close(q, by_pot(scores, 0.05, rows, columns), rtol=1e-7, atol=1e-13)
    torch.testing.assert_close(q.sum(1), rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(q.sum(0), columns, rtol=1e-10, atol=0)


def self_label(p: Tensor, power: float, tolerance: float) -> tuple[Tensor, int, float]:
    """Self-Label's own iterations (Section 3.2 there) on P^lambda: (plan, iterations, last sum |c / c' - 1|)."""
    n, k = p.shape
    m = (p / n) ** power  # [N, K]
    c, done, error = torch.full((n,), 1 / n, dtype=torch.float64), 0, math.inf
    while error >= tolerance:
        r = (1 / k) / (m.T @ c)
        new = (1 / n) / (m @ r)
        done += 1
        if done % 10 == 0:
            error = (c / new - 1).abs().sum().item()
        c = new
    return c[:, None] * m * r, done, error


@pytest.mark.parametrize(("power", "tolerance"), [(10.0, 0.01), (25.0, 0.1)])
def test_it_is_self_labels_iteration_and_criterion(power: float, tolerance: float) -> None:
    log_p = log_probabilities(200, 8)
    expected, iterations, error = self_label(log_p.exp(), power, tolerance)
    found = transport(log_p, epsilon=1 / power, tolerance=tolerance)
    assert found.iterations == iterations
    assert found.violation == pytest.approx(error, rel=1e-6)
    torch.testing.assert_close(plan(log_p, found, epsilon=1 / power), expected, rtol=1e-8, atol=1e-16)
    assert torch.equal(plan_labels(log_p, found, epsilon=1 / power), by_pot(log_p, 1 / power).argmax(1))


def test_labels_are_nearly_those_of_exact_transport() -> None:
    log_p = log_probabilities(400, 10)
    found = transport(log_p, epsilon=1 / 25, tolerance=0.01)
    labels = plan_labels(log_p, found, epsilon=1 / 25)
    n, k = log_p.shape
    exact = torch.from_numpy(pot.emd([1 / n] * n, [1 / k] * k, -log_p.numpy()))
    assert (labels == exact.argmax(1)).float().mean() > 0.97
    counts = labels.bincount(minlength=k)
    assert (counts - 40).abs().max() <= 4
    assert (log_p.argmax(1).bincount(minlength=k) - 40).abs().max() > 4  # which the best guesses are not


def test_limits_of_the_weight_of_entropy() -> None:
    log_p = log_probabilities(30, 5)
    flat = transport(log_p, epsilon=1e6, tolerance=1e-9)
    torch.testing.assert_close(plan(log_p, flat, epsilon=1e6), torch.full((30, 5), 1 / 150, dtype=torch.float64))
    # As many classes as images: each has one.
    square = log_probabilities(6, 6, seed=5)
    sharp = transport(square, epsilon=0.05, tolerance=1e-6, most=5_000)
    labels = plan_labels(square, sharp, epsilon=0.05)
    assert sorted(labels.tolist()) == list(range(6))
    assert torch.equal(labels, torch.from_numpy(pot.emd([1 / 6] * 6, [1 / 6] * 6, -square.numpy())).argmax(1))


class Lazy:
    """Scores of features that are made when they are asked for."""

    def __init__(self, features: Tensor, weight: Tensor):
        self.features, self.weight, self.most = features, weight, 0
        self.shape = (len(features), len(weight))

    def __getitem__(self, rows: slice) -> Tensor:
        part = torch.log_softmax(self.features[rows] @ self.weight.T, dim=1)
        self.most = max(self.most, len(part))
        return part


def test_scores_may_be_made_chunk_by_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (50, 6))
    lazy = Lazy(features, weight)
    scores = lazy[0:50]
    lazy.most = 0
    found = transport(lazy, epsilon=0.1, tolerance=0.01, chunk=16)
    labels = plan_labels(lazy, found, epsilon=0.1, chunk=16)
    assert lazy.most == 16
    expected = transport(scores, epsilon=0.1, tolerance=0.01)
    torch.testing.assert_close(found.columns, expected.columns)
    assert torch.equal(labels, plan_labels(scores, expected, epsilon=0.1))


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    scores = cosines()
    torch.testing.assert_close(sinkhorn(scores.cuda(), epsilon=0.05).cpu(), sinkhorn(scores, epsilon=0.05))
    found, expected = (transport(s, epsilon=0.05, tolerance=1e-6) for s in (scores.cuda(), scores))
    assert found.iterations == expected.iterations
    torch.testing.assert_close(found.columns.cpu(), expected.columns)


def test_it_stops_at_the_most_iterations() -> None:
    found = transport(cosines(), epsilon=0.001, tolerance=1e-12, most=13)
    assert found.iterations == 13
    assert found.violation > 1e-12


def test_refuses() -> None:
    scores = cosines()
    with pytest.raises(ValueError, match=r"\[rows, columns\], not \[24\]"):
        sinkhorn(scores[:, 0], epsilon=0.05)
    with pytest.raises(ValueError, match=r"epsilon is 0"):
        sinkhorn(scores, epsilon=0.0)
    with pytest.raises(ValueError, match="at least one is needed"):
        sinkhorn(scores, epsilon=0.05, iterations=0)
    with pytest.raises(ValueError, match="must be positive"):
        transport(scores, epsilon=0.05, tolerance=0.0)
    with pytest.raises(ValueError, match=r"masses of 24 rows and 7 columns, not \[\[24\], \[6\]\]"):
        transport(scores, epsilon=0.05, tolerance=1.0, log_column_mass=torch.zeros(6))


def test_scores_that_are_not_finite_are_refused_soon() -> None:
    scores = log_probabilities(50, 4)
    scores[7, 1] = torch.nan
    with pytest.raises(RunError, match=r"not finite.*last checkpoint is intact"):
        transport(scores, epsilon=0.1, tolerance=0.1, most=10)
