"""Agreement of labellings against scikit-learn, and sampling that draws every label equally often."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from mvmr.data.loading import weighted_draw
from mvmr.ops.labels import normalised_mutual_information, of_all_ranks, uniform_over_labels
from ranks import run_on_ranks


def labelling(classes: int, *, seed: int, count: int = 1000) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed)).square()  # with gaps


@pytest.mark.parametrize(("a", "b"), [(2, 2), (10, 3), (40, 40), (1000, 7)])
def test_mutual_information_equals_scikit_learns(a: int, b: int) -> None:
    for first, second in [
        (labelling(a, seed=0), labelling(b, seed=1)),
        (labelling(a, seed=0), labelling(a, seed=0) // b),
    ]:
        expected = normalized_mutual_info_score(first, second, average_method="geometric")
        assert normalised_mutual_information(first, second) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_at_its_ends() -> None:
    a = labelling(9, seed=0)
    assert normalised_mutual_information(a, -3 * a + 1) == pytest.approx(1.0), "names do not count"
    square = torch.arange(36)
    assert normalised_mutual_information(square // 6, square % 6) == pytest.approx(0.0, abs=1e-12)
    one = torch.zeros_like(a)
    assert normalised_mutual_information(a, one) == normalised_mutual_information(one, a) == 0.0
    assert normalised_mutual_information(one, one + 5) == 1.0
    for wrong in (a[:-1], a[:0], a.view(2, -1)):
        with pytest.raises(ValueError, match="same images"):
            normalised_mutual_information(wrong, a if wrong.shape != a[:0].shape else wrong)


def test_every_label_is_drawn_equally_often() -> None:
    """Counted on what is trained on: the pair of an image and its label."""
    sizes = torch.tensor([1, 3, 10, 60, 400, 1526])
    labels = torch.arange(6).repeat_interleave(sizes)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    drawn = torch.cat([weighted_draw(0, epoch, uniform_over_labels(labels)) for epoch in range(10)])
    counts = labels[drawn].bincount(minlength=6)
    assert (counts - 20_000 / 6).abs().max() < 5 * (20_000 * 5 / 36) ** 0.5, "six equal shares of 20,000 draws"
    within = drawn[labels[drawn] == 3].bincount(minlength=2000)[labels == 3]
    expected = counts[3] / 60
    assert (within - expected).abs().max() < 6 * expected**0.5, "and in a cluster every image alike"


def test_labels_that_do_not_occur_have_no_share() -> None:
    weights = uniform_over_labels(torch.tensor([7, 7, 2, 7]))
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1.0, 1 / 3], dtype=torch.float64))


def test_official_positions_lose_the_balance_as_the_released_code_does() -> None:
    """Simulated from its two steps: numbers drawn uniformly over clusters, then used as places in a sorted list."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.randn(50, generator=generator).exp()
    labels = torch.multinomial(shares, 20_000, replacement=True, generator=generator)
    numbers = weighted_draw(0, 0, uniform_over_labels(labels))
    in_cluster_order = torch.cat([(labels == cluster).nonzero().flatten() for cluster in range(50)])
    trained_on = in_cluster_order[numbers]  # image numbers taken for places

    weights, plain = uniform_over_labels(labels, official_positions=True), uniform_over_labels(labels)
    assert torch.equal(weights[in_cluster_order], plain)
    sizes = labels.bincount(minlength=50).double()
    draws = (trained_on, weighted_draw(1, 0, weights))
    theirs, ours = (labels[drawn].bincount(minlength=50).double() for drawn in draws)
    for counts in (theirs, ours):
        assert torch.corrcoef(torch.stack([counts, sizes]))[0, 1] > 0.99, "drawn by size after all"
    assert (theirs - ours).abs().max() < 6 * (2 * theirs.max()) ** 0.5


def on_rank(rank: int) -> Tensor:
    index = torch.arange(rank, 11, 2)
    return of_all_ranks(index.square() - 3, index, 11)


def test_labels_of_all_ranks_come_together() -> None:
    expected = torch.arange(11).square() - 3
    assert torch.equal(of_all_ranks(expected.flip(0), torch.arange(10, -1, -1), 11), expected)
    for found in run_on_ranks(on_rank, 2):
        assert torch.equal(found, expected)
