"""The clustering methods' cross-entropies against loops written from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mvmr.losses.clustering import cluster_cross_entropy, hierarchical_cross_entropy, prototype_cross_entropy
from mvmr.nets.sub_heads import SubHeads


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(scores: list[list[float]], labels: list[int]) -> float:
    """-(1/N) sum_n ln(exp(s_n,y_n) / sum_k exp(s_n,k))."""
    total = 0.0
    for row, label in zip(scores, labels, strict=True):
        total -= math.log(math.exp(row[label]) / sum(math.exp(s) for s in row))
    return total / len(scores)


def test_cross_entropy_equals_its_definition() -> None:
    scores, labels = drawn(7, 5), torch.tensor([0, 4, 1, 1, 3, 2, 0])
    found = cluster_cross_entropy(scores, labels)
    assert found.item() == pytest.approx(slow(scores.tolist(), labels.tolist()), abs=1e-10)
    order = torch.tensor([3, 0, 4, 2, 1])  # new numbers for the clusters
    assert cluster_cross_entropy(scores[:, order], order.argsort()[labels]).item() == pytest.approx(found.item())
    assert cluster_cross_entropy(torch.zeros(7, 5), labels).item() == pytest.approx(math.log(5))


def test_two_levels_are_one_classifier_of_all_pairs() -> None:
    """-ln p(y) - ln p(z | y) is the cross-entropy of the S x K-way classifier with log-scores ln p(y) + ln p(z | y)."""
    supers, subs, images = 6, 4, 9
    features, v = drawn(images, 8), drawn(supers, 8, seed=1)
    w = drawn(supers, subs, 8, seed=2)
    y, z = torch.arange(images) % supers, torch.arange(images) * 3 % subs
    own = torch.stack([features[n] @ w[y[n]].T for n in range(images)])  # [B, K], of each image's own classifier
    of_super, of_sub = hierarchical_cross_entropy(features @ v.T, y, own, z)
    pairs = (features @ v.T).log_softmax(1)[:, :, None] + torch.einsum("bd,skd->bsk", features, w).log_softmax(2)
    flat = cluster_cross_entropy(pairs.flatten(1), y * subs + z)
    assert (of_super + of_sub).item() == pytest.approx(flat.item(), abs=1e-10)
    expected = 0.0
    for n in range(images):  # the equation, by hand
        top = [sum(a * b for a, b in zip(features[n].tolist(), row, strict=True)) for row in v.tolist()]
        bottom = [sum(a * b for a, b in zip(features[n].tolist(), row, strict=True)) for row in w[int(y[n])].tolist()]
        expected += (slow([top], [int(y[n])]) + slow([bottom], [int(z[n])])) / images
    assert (of_super + of_sub).item() == pytest.approx(expected, abs=1e-10)


def test_one_super_class_or_one_sub_class_costs_nothing() -> None:
    scores, labels, none = drawn(5, 4), torch.arange(5) % 4, torch.zeros(5, dtype=torch.int64)
    assert [v.item() for v in hierarchical_cross_entropy(drawn(5, 1), none, scores, labels)] == [
        0.0,
        cluster_cross_entropy(scores, labels).item(),
    ]
    assert hierarchical_cross_entropy(scores, labels, drawn(5, 1), none)[1].item() == 0.0


def test_each_row_meets_the_classifier_of_its_own_super_class() -> None:
    heads = SubHeads(8, 5, 3).double()
    nn.init.normal_(heads.weight)
    nn.init.normal_(heads.bias)
    features = drawn(11, 8).requires_grad_()
    y = torch.tensor([3, 0, 0, 4, 3, 3, 1, 0, 4, 1, 3])  # 2 does not occur
    scores = heads(features, y)
    expected = torch.einsum("bd,bkd->bk", features, heads.weight[y]) + heads.bias[y]
    torch.testing.assert_close(scores, expected)
    inputs = (features, heads.weight, heads.bias)
    weights = drawn(11, 3, seed=5)
    found = torch.autograd.grad((scores * weights).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, by_hand in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, by_hand)
    assert found[1][2].abs().max() == 0


def test_prototypes_are_told_from_every_view() -> None:
    z, prototypes, labels = normalize(drawn(6, 3, 8), dim=2), normalize(drawn(5, 8, seed=1), dim=1), torch.arange(6) % 5
    found = prototype_cross_entropy(z, prototypes, labels, temperature=0.1).item()
    expected = 0.0
    for n in range(6):
        for v in range(3):
            scores = [sum(a * b for a, b in zip(z[n, v].tolist(), c, strict=True)) / 0.1 for c in prototypes.tolist()]
            expected += slow([scores], [int(labels[n])]) / 18
    assert found == pytest.approx(expected, abs=1e-10)
    swapped = prototype_cross_entropy(z.flip(1), prototypes, labels, temperature=0.1).item()
    assert swapped == pytest.approx(found, abs=1e-12), "views are alike"


def test_half_precision_is_left_behind() -> None:
    z, prototypes = normalize(drawn(64, 2, 32), dim=2).float(), normalize(drawn(50, 32, seed=1), dim=1).float()
    labels = torch.arange(64) % 50
    exact = prototype_cross_entropy(z, prototypes, labels, temperature=0.01)
    scores = 30 * drawn(64, 50, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prototype_cross_entropy(z, prototypes, labels, temperature=0.01).item() == exact.item()
        rough = cluster_cross_entropy(scores.bfloat16(), labels)
    assert rough.dtype == torch.float32
    assert rough.item() == cluster_cross_entropy(scores.bfloat16().float(), labels).item()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \[B, K\]"):
        cluster_cross_entropy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="prototypes"):
        prototype_cross_entropy(torch.zeros(4, 2, 3), torch.zeros(5, 2), torch.zeros(4), temperature=1.0)
