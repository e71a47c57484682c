"""Entropic optimal transport by Sinkhorn and Knopp's iterations, in the log domain and over the rows of all ranks.

Cuturi, "Sinkhorn distances", NIPS 2013: max_Q <Q, S> + epsilon H(Q), for given sums of Q's rows and columns, is solved
by Q = exp(S / epsilon + a 1^T + 1 b^T). SwAV's codes are a few iterations of it (Caron et al., NeurIPS 2020, Eqs. 3 to
5), Self-Label's pseudo-labels its limit (Asano, Rupprecht, Vedaldi, ICLR 2020). In the log domain nothing overflows or
vanishes, whatever epsilon.

Every rank has some rows [n, K] of the N x K scores, n differing from rank to rank if need be, and keeps the potentials:
a of its rows, b of all columns. Only K numbers an iteration travel. Rows are worked through in chunks, so beside the
scores, which are never copied, the memory is that of a few chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mvmr.errors import NOT_FINITE, RunError
from mvmr.ops.collectives import all_reduce_sum, gather

CHUNK_VALUES = 1 << 22
"""Values of a chunk where its rows are not given: 32 MiB in float64."""


class Scores(Protocol):
    """A tensor [n, K], or anything that makes its rows when they are sliced: scores that are too many to be kept."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Potentials(NamedTuple):
    """The solution Q = exp(scores / epsilon + rows[:, None] + columns), whose rows sum to their mass exactly."""

    rows: Tensor
    """a, [n]."""
    columns: Tensor
    """b, [K], equal on all ranks."""
    iterations: int
    """Updates of each."""
    violation: float
    """Sum over the rows of all ranks of |sum of the row / its mass - 1|, before the last update of a."""


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int = 3, chunk: int | None = None) -> Tensor:
    """SwAV's codes (Eq. 5, Appendix A.1), this rank's rows [B, K] -> [B, K], each row a distribution; no gradient.

    With Q = exp(scores / epsilon) over the N rows of all ranks, `iterations` times: columns (prototypes) are scaled to
    sum to 1 / K, then rows (images) to 1 / N, in this order, as in the released code. The result is N Q: after few
    iterations its rows sum to 1, its columns to N / K only nearly. Equal scores give 1 / K everywhere.
    epsilon > 0: small makes codes sharp. chunk: rows at a time; null: 4 M values. Ranks may have different numbers of
    rows. float32 (float64 for such scores) whatever autocast says. Raises ValueError for scores that are no matrix, an
    epsilon that is not positive, and fewer than one iteration.
    """
    _check(scores, epsilon)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least one is needed")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        share = torch.zeros(len(scores), dtype=dtype, device=scores.device)  # all rows weigh the same, whatever it is
        columns = -_log_column_sums(scores, None, share, epsilon, chunk)
        for _ in range(iterations - 1):
            columns = columns - _log_column_sums(scores, columns, share, epsilon, chunk)
        codes = torch.empty(scores.shape, dtype=dtype, device=scores.device)
        for rows, part in _chunks(scores, chunk):
            codes[rows] = torch.softmax(part.to(dtype) / epsilon + columns, dim=1)
    return codes


@torch.no_grad()
def transport(
    scores: Scores,
    *,
    epsilon: float,
    tolerance: float,
    most: int = 10_000,
    log_row_mass: Tensor | None = None,
    log_column_mass: Tensor | None = None,
    chunk: int | None = None,
) -> Potentials:
    """The limit of those iterations: max_Q <Q, scores> + epsilon H(Q) for the given row and column sums of Q >= 0.

    scores: [n, K], this rank's rows of all N. log_row_mass: [n], by default -ln N; log_column_mass: [K], by default
    -ln K; both in the log domain, and each mass sums to 1 over all ranks. Columns first, then rows; looked at every 10
    iterations and at the `most`-th, it ends where the rows' violation (see Potentials) before their update is below
    `tolerance`: with u_i = exp(a_i) that is Self-Label's sum_i |u_i / u_i' - 1|, a sum over N (its code: 0.1 for
    ImageNet, 0.01 for CIFAR). Self-Label's problem is scores = ln p(y|x), epsilon = 1 / lambda.
    chunk: rows at a time; null: 4 M values. All arithmetic is in float64 on the scores' device: the tolerance is 1e-7 a
    row of ImageNet's. Raises ValueError for scores that are no matrix, masses of other lengths, an epsilon or a
    tolerance that is not positive.
    RunError, on all ranks at once, where a score of any is not finite.
    """
    _check(scores, epsilon)
    if tolerance <= 0 or most < 1:
        raise ValueError(f"tolerance is {tolerance} and most is {most}; they must be positive")
    share, mass = _log_masses(scores, log_row_mass, log_column_mass)  # [n], [K]
    columns = mass - _log_column_sums(scores, None, share, epsilon, chunk)
    rows, done = torch.zeros_like(share), 0
    while True:
        new = torch.empty_like(rows)
        sums = _log_column_sums(scores, columns, share, epsilon, chunk, rows=new)
        rows, before, done = new, rows, done + 1
        if done % 10 == 0 or done >= most:
            violation = float(all_reduce_sum((before - rows).expm1().abs().sum()))
            if not math.isfinite(violation):
                raise RunError(NOT_FINITE)
            if violation < tolerance or done >= most:
                return Potentials(rows, columns, done, violation)
        columns = columns + mass - sums


@torch.no_grad()
def plan(scores: Tensor, potentials: Potentials, *, epsilon: float) -> Tensor:
    """Q = exp(scores / epsilon + a 1^T + 1 b^T) of this rank's rows: [n, K] -> [n, K] float64."""
    return (scores.double() / epsilon + potentials.rows[:, None] + potentials.columns).exp()


@torch.no_grad()
def plan_labels(scores: Scores, potentials: Potentials, *, epsilon: float, chunk: int | None = None) -> Tensor:
    """The greatest of the columns of every row of the plan (Self-Label's labels): [n, K] -> [n] int64."""
    labels = torch.empty(scores.shape[0], dtype=torch.int64, device=potentials.columns.device)
    for rows, part in _chunks(scores, chunk):
        labels[rows] = (part.double() / epsilon + potentials.columns).argmax(1)
    return labels


def _log_column_sums(
    scores: Scores,
    columns: Tensor | None,
    share: Tensor,
    epsilon: float,
    chunk: int | None,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Logarithm of the column sums [K], over all ranks, once rows are scaled to exp(share); one pass over the scores.

    columns: b so far, [K]; None: rows are not scaled, exp(scores / epsilon) is added up as it is. share: [n], of the
    type that is computed in. rows: [n], filled with a where given.
    """
    sums = [share.new_full((scores.shape[1],), -torch.inf)]  # a rank without rows takes part, too
    for here, part in _chunks(scores, chunk):
        x = part.to(share.dtype) / epsilon  # [m, K]
        if columns is not None:
            x += columns
            a = share[here] - x.logsumexp(1)  # [m]
            x += a[:, None]
            if rows is not None:
                rows[here] = a
        sums.append(x.logsumexp(0))
    return gather(torch.stack(sums).logsumexp(0)[None]).logsumexp(0)


def _log_masses(scores: Scores, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logarithm of what rows [n] and columns [K] are to sum to, in float64 on the scores' device."""
    count, width = scores.shape
    device = scores[0:0].device
    if rows is None:
        total = all_reduce_sum(torch.tensor(float(count), dtype=torch.float64, device=device))
        rows = -total.log().expand(count)
    if columns is None:
        columns = -torch.full((width,), float(width)).double().log()
    if rows.shape != (count,) or columns.shape != (width,):
        given = [list(rows.shape), list(columns.shape)]
        raise ValueError(f"scores {[count, width]} need masses of {count} rows and {width} columns, not {given}")
    return rows.to(device, torch.float64), columns.to(device, torch.float64)


def _chunks(scores: Scores, chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    count, width = scores.shape
    step = chunk or max(1, CHUNK_VALUES // max(1, width))
    for start in range(0, count, step):
        rows = slice(start, min(count, start + step))
        yield rows, scores[rows]


def _check(scores: Scores, epsilon: float) -> None:
    if len(scores.shape) != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores are [rows, columns], not {list(scores.shape)}")
    if epsilon <= 0:
        raise ValueError(f"epsilon is {epsilon}; it must be positive")
