"""Retrieval against scikit-learn, torchmetrics and a loop from the definitions, and what must hold for any ranking."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from mvmr.evaluation import retrieval as module
from mvmr.evaluation.intervals import mean_interval
from mvmr.evaluation.retrieval import RetrievalConfig, outcomes, retrieval
from mvmr.types import Features, RunError, UserError


def split(counts: tuple[int, int] = (90, 40), classes: int = 5, seed: int = 0) -> tuple[Features, Features]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=generator, dtype=torch.float64)
    parts = []
    for count in counts:
        y = torch.randint(0, classes, (count,), generator=generator)
        parts.append(Features(centres[y] + 1.2 * torch.randn(count, 8, generator=generator, dtype=torch.float64), y))
    return parts[0], parts[1]


def cosines(train: Features, test: Features, gallery: str) -> Tensor:
    """[M, N], and of the other test images [M, M - 1] without the diagonal."""
    searched = train if gallery == "train" else test
    found = torch.nn.functional.cosine_similarity(test.x[:, None], searched.x[None], dim=-1)
    return found if gallery == "train" else found[~torch.eye(len(found), dtype=torch.bool)].view(len(found), -1)


def relevance(train: Features, test: Features, gallery: str) -> Tensor:
    searched = train if gallery == "train" else test
    found = test.y[:, None] == searched.y[None]
    return found if gallery == "train" else found[~torch.eye(len(found), dtype=torch.bool)].view(len(found), -1)


def by_definition(scores: list[float], relevant: list[bool], k: tuple[int, ...]) -> dict[str, float]:
    """One query in exact fractions: ranked, then the definitions in words."""
    ranked = [relevant[i] for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i))]
    number = sum(ranked)

    def precision(rank: int) -> Fraction:
        return Fraction(sum(ranked[:rank]), rank)

    def at(depth: int, most: int) -> float:
        return float(sum(precision(rank) for rank in range(1, depth + 1) if ranked[rank - 1]) / most)

    found = {"map": at(len(ranked), number)}
    found |= {f"map@{depth}": at(depth, min(depth, number)) for depth in k}
    return found | {f"recall@{depth}": float(any(ranked[:depth])) for depth in k}


@pytest.mark.parametrize("gallery", ["train", "test"])
def test_every_query_agrees_with_the_definitions(gallery: str) -> None:
    train, test = split()
    config = RetrievalConfig(gallery=gallery, k=(1, 3, 10, 39))
    found = outcomes(train, test, config)
    scores, relevant = cosines(train, test, gallery), relevance(train, test, gallery)
    expected = [by_definition(s, r, config.k) for s, r in zip(scores.tolist(), relevant.tolist(), strict=True)]
    assert list(found) == list(expected[0])
    for name, values in found.items():
        assert values.dtype == torch.float64
        assert values.tolist() == pytest.approx([one[name] for one in expected], abs=1e-12)
    metrics = retrieval(train, test, config)
    assert metrics == pytest.approx({name: 100 * values.mean().item() for name, values in found.items()})
    assert 0 < metrics["map"] < 100


@pytest.mark.parametrize("gallery", ["train", "test"])
def test_against_scikit_learn_and_torchmetrics(gallery: str) -> None:
    train, test = split(seed=1)
    config = RetrievalConfig(gallery=gallery, k=(1, 4, 20))
    found = outcomes(train, test, config)
    for number, (scores, relevant) in enumerate(
        zip(cosines(train, test, gallery), relevance(train, test, gallery), strict=True)
    ):
        assert found["map"][number].item() == pytest.approx(average_precision_score(relevant, scores), abs=1e-12)
        scores = scores + 2  # torchmetrics takes no image with a score of 0 or less for relevant
        theirs = retrieval_average_precision(scores, relevant).item()
        assert found["map"][number].item() == pytest.approx(theirs, abs=1e-6)
        ranked = relevant[scores.argsort(descending=True)]
        for depth in config.k:
            # Theirs is divided by the relevant images among the first K, ours by those that could be there.
            factor = ranked[:depth].sum().item() / min(depth, int(relevant.sum()))
            theirs = factor * retrieval_average_precision(scores, relevant, top_k=depth).item()
            assert found[f"map@{depth}"][number].item() == pytest.approx(theirs, abs=1e-6)
            assert found[f"recall@{depth}"][number] == retrieval_hit_rate(scores, relevant, top_k=depth)


def test_known_limits() -> None:
    x = torch.eye(4).repeat_interleave(6, 0)
    y = torch.arange(4).repeat_interleave(6)
    perfect = retrieval(Features(x, y), Features(x, y), RetrievalConfig())
    assert set(perfect.values()) == {100.0}
    assert set(retrieval(Features(x, y), Features(x, y), RetrievalConfig(gallery="test")).values()) == {100.0}
    worst = retrieval(Features(x, y), Features(-x[:6], y[:6]), RetrievalConfig())
    assert worst["recall@10"] == worst["map@10"] == 0.0
    last = sum((rank - 18) / rank for rank in range(19, 25)) / 6
    assert worst["map"] == pytest.approx(100 * last)
    # A random ranking has about the classes' share as its mAP, a little more by the first ranks' luck.
    train, test = split((2000, 200), classes=4)
    noise = torch.randn(2200, 8, generator=torch.Generator().manual_seed(2))
    chance = retrieval(Features(noise[:2000], train.y), Features(noise[2000:], test.y), RetrievalConfig())
    assert chance["map"] == pytest.approx(25.0, abs=1.5)
    assert chance["recall@1"] == pytest.approx(25.0, abs=12)
    assert chance["recall@10"] == pytest.approx(100 * (1 - 0.75**10), abs=10)


def test_lengths_rotations_and_dtype_change_nothing() -> None:
    train, test = split()
    for gallery in ("train", "test"):
        config = RetrievalConfig(gallery=gallery)
        plain = retrieval(train, test, config)
        turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
        moved = [Features(part.x @ turn * (0.1 + torch.rand(len(part.x), 1)), part.y) for part in (train, test)]
        assert retrieval(*moved, config) == pytest.approx(plain, abs=1e-9)
        single = [Features(part.x.float(), part.y) for part in (train, test)]
        assert retrieval(*single, config) == pytest.approx(plain, abs=0.5)
    assert retrieval(Features(test.x[:1] * math.nan), test, config) == plain  # the training images are not looked at


def test_ties_go_to_the_earlier_image() -> None:
    x, query = torch.ones(5, 3), Features(torch.ones(1, 3), torch.tensor([1]))
    config = RetrievalConfig(k=(1, 2, 4))
    found = retrieval(Features(x, torch.tensor([0, 1, 0, 0, 1])), query, config)
    expected = {"map": (1 / 2 + 2 / 5) / 2, "map@1": 0, "map@2": 1 / 4, "map@4": 1 / 4}
    expected |= {"recall@1": 0, "recall@2": 1, "recall@4": 1}
    assert found == pytest.approx({name: 100 * value for name, value in expected.items()})
    # Each leaves itself out, wherever it stands among its equals.
    alone = outcomes(query, Features(x, torch.tensor([0, 1, 0, 0, 1])), RetrievalConfig(gallery="test", k=(1,)))
    assert alone["map"][1].item() == 1 / 4
    assert alone["map"][4].item() == 1 / 2
    assert alone["recall@1"].tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("gallery", ["train", "test"])
def test_blocks_change_nothing(gallery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = split()
    config = RetrievalConfig(gallery=gallery)
    whole = outcomes(train, test, config)
    searched = len(train.x if gallery == "train" else test.x)
    largest, measure = 0, module._measured

    def watched(relevant: Tensor, k: tuple[int, ...]) -> dict[str, Tensor]:
        nonlocal largest
        largest = max(largest, len(relevant))
        return measure(relevant, k)

    monkeypatch.setattr(module, "_measured", watched)
    for block, rows in ((1, 1), (7 * searched, 7)):
        monkeypatch.setattr(module, "BLOCK", block)
        largest = 0
        found = outcomes(train, test, config)
        assert largest == rows
        for name, values in whole.items():
            torch.testing.assert_close(found[name], values)


def test_queries_without_relevant_images_are_left_out() -> None:
    train, test = split()
    here = train.y != 3
    fewer = Features(train.x[here], train.y[here])
    with pytest.warns(UserWarning, match=f"leaves out {int((test.y == 3).sum())} test images"):
        metrics = retrieval(fewer, test, RetrievalConfig())
    known = test.y != 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert retrieval(fewer, Features(test.x[known], test.y[known]), RetrievalConfig()) == pytest.approx(metrics)
    found = outcomes(fewer, test, RetrievalConfig())
    for values in found.values():
        assert torch.equal(values.isnan(), ~known)
    interval = mean_interval(100 * found["map"][known])
    assert interval.low < interval.value == pytest.approx(metrics["map"])
    single = Features(test.x[:12], torch.arange(12))
    with pytest.raises(UserError, match=r"retrieval\.gallery=test: no test image has another of its class"):
        retrieval(train, single, RetrievalConfig(gallery="test"))


def test_wrong_features() -> None:
    train, test = split()
    with pytest.raises(UserError, match="train split has no labels"):
        retrieval(Features(train.x), test, RetrievalConfig())
    with pytest.raises(UserError, match="test split has no labels"):
        retrieval(train, Features(test.x), RetrievalConfig(gallery="test"))
    with pytest.raises(RunError, match="not finite"):
        retrieval(train, Features(test.x * math.inf, test.y), RetrievalConfig())
    with pytest.raises(UserError, match=r"retrieval\.k=91: there are 90 images"):
        retrieval(train, test, RetrievalConfig(k=(1, 91)))
    with pytest.raises(UserError, match=r"retrieval\.k=40: there are 39 images"):
        retrieval(train, test, RetrievalConfig(gallery="test", k=(40,)))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        RetrievalConfig(k=(0,))
    assert set(retrieval(train, test, RetrievalConfig(k=()))) == {"map"}


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    train, test = split()
    moved = [Features(part.x.cuda(), part.y) for part in (train, test)]
    for gallery in ("train", "test"):
        config = RetrievalConfig(gallery=gallery)
        assert retrieval(*moved, config) == pytest.approx(retrieval(train, test, config), abs=1e-9)
