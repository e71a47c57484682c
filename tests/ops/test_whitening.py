"""PCA with whitening against scikit-learn; the same on any number of ranks and in one pass or two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import normalize

from mvmr.errors import RunError
from mvmr.ops import whitening as module
from mvmr.ops.whitening import Moments, whitened_pass, whitening_of
from ranks import run_on_ranks


def digits() -> Tensor:
    return torch.from_numpy(load_digits().data) + 30  # far from the origin, float64


@pytest.mark.parametrize("width", [3, 20, 50])
def test_equals_scikit_learns_up_to_signs(width: int) -> None:
    x = digits()
    theirs = torch.from_numpy(PCA(width, whiten=True, svd_solver="full").fit_transform(x.numpy()))
    ours = whitening_of(x, width)(x)
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.mean(0), torch.zeros(width, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(ours.T.cov(), torch.eye(width, dtype=torch.float64), atol=1e-8, rtol=0)


def test_gram_matrix_of_unit_rows_equals_scikit_learns() -> None:
    """What k-means sees: signs and rotations of the components do not count."""
    x = digits()
    theirs = normalize(torch.from_numpy(PCA(16, whiten=True, svd_solver="full").fit_transform(x.numpy())), dim=1)
    _, ours = whitened_pass(over(x.float()), lambda images: images, 16)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double() @ ours.double().T, theirs @ theirs.T, rtol=0, atol=5e-5)


def test_components_without_variance_are_zero() -> None:
    x = torch.cat([digits(), torch.ones(1797, 4, dtype=torch.float64)], dim=1)  # three pixels are constant, too
    white = whitening_of(x, 68)(x)
    assert white.isfinite().all()
    variances = white.var(0)
    assert int((variances > 0.99).sum()) == 61
    assert variances[61:].max() == 0


def test_narrower_features_keep_their_width_and_epsilon_holds_small_variances_down() -> None:
    x = digits()[:, 10:14]
    assert whitening_of(x, 256)(x).shape == (1797, 4)
    largest = torch.linalg.eigvalsh(x.T.cov())
    expected = (largest / largest.clamp(min=0.3 * largest.max())).flip(0)
    assert expected[0] == 1
    assert expected[-1] < 1
    torch.testing.assert_close(whitening_of(x, 4, epsilon=0.3)(x).var(0), expected)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = digits()
    whole = whitening_of(x, 10)
    moments = Moments(64)
    for part in x.split(100):
        moments.add(part)
    torch.testing.assert_close(moments.whitening(10)(x), whole(x), rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(module, "PART", 77)
    torch.testing.assert_close(whitening_of(x, 10)(x), whole(x), rtol=1e-9, atol=1e-9)


def test_float32_rows_are_added_up_in_float64() -> None:
    x = digits().float() + 3000  # squares of 9e6, of which float32 would keep no more than the unit
    exact = whitening_of(x.double(), 10)(x.double())
    torch.testing.assert_close(whitening_of(x, 10)(x).double(), exact, rtol=1e-4, atol=1e-4)


def over(x: Tensor) -> Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]:
    """A pass over rows, in parts; the engine's gives images."""

    def pass_over(fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return torch.arange(len(x)), torch.cat([fn(part) for part in x.split(500)])

    return pass_over


def test_two_passes_equal_one_and_hold_no_features() -> None:
    x, seen = digits(), []

    def features(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.square()

    index, once = whitened_pass(over(x), features, 12)  # type: ignore[arg-type]
    assert sum(seen) == len(x)
    again, twice = whitened_pass(over(x), features, 12, twice=True)  # type: ignore[arg-type]
    assert sum(seen) == 3 * len(x)
    assert torch.equal(index, again)
    torch.testing.assert_close(once, twice, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(once.norm(dim=1), torch.ones(len(x), dtype=torch.float64))


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="two rows or more"):
        whitening_of(torch.zeros(rows, 3), 2)


def on_rank(rank: int, parts: list[list[int]]) -> tuple[Tensor, Tensor]:
    x = digits()[parts[rank]]
    found = whitening_of(x, 12)
    return found.directions * found.scales, found(x)


def test_ranks_with_their_own_rows_find_the_same() -> None:
    whole, white = on_rank(0, [list(range(1797))])
    parts = [list(range(1000)), list(range(1000, 1797))]
    for part, (matrix, rows) in zip(parts, run_on_ranks(on_rank, 2, parts), strict=True):
        torch.testing.assert_close(matrix, whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rows, white[part], rtol=1e-8, atol=1e-8)


def one_bad_rank(rank: int) -> str:
    x = digits()[rank::2].clone()
    x[3, 5] = torch.nan if rank else x[3, 5]
    with pytest.raises(RunError) as error:
        whitening_of(x, 8)
    return str(error.value)


def test_rows_that_are_not_finite_stop_all_ranks() -> None:
    assert all("features of the data set are not finite" in message for message in run_on_ranks(one_bad_rank, 2))
