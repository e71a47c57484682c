"""One command, several encoders: features are made once, results are kept and taken up, and nothing is changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import mvmr.evaluation.cached_features as cached_module
from mvmr.api import evaluate
from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig, open_source
from mvmr.errors import UserError
from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.cached_features import cached_features, encoder_fingerprint
from mvmr.evaluation.comparison import compare
from mvmr.evaluation.features import features_of
from mvmr.evaluation.intervals import mean_interval, paired_interval, statistic_interval
from mvmr.evaluation.results import read_result
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, random_encoder, save_encoder
from mvmr.types import Result

CARD = EncoderCard(
    encoder=EncoderConfig(name="resnet18", stem="mvmr", width=0.0625), dim=32, image_size=16, mean=(0.3, 0.3, 0.3),
    std=(0.4, 0.4, 0.4), method="none", data="digits", version="0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of an encoder saw, one entry a call."""
    seen: list[int] = []
    original = Encoder.normalised

    def counted(self: Encoder, images: Tensor) -> Tensor:
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Encoder, "normalised", counted)
    return seen


def state(encoder: Encoder) -> tuple[dict[str, Tensor], list[bool]]:
    return copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]


SMALL: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 1},
    "clustering": {"starts": 1, "iterations": 3},
    "logistic": {"draws": 2, "labels_per_class": 2},
    "finetune": {"epochs": 1, "labels_per_class": 4, "batch_size": 20},
    "robustness": {"corruptions": ["brightness"], "severities": [1], "l2": 10.0},
    "diagnostics": {"images": 64, "pair_images": 16, "view_images": 16, "views": 2, "representations": ["pixels"]},
}
"""Settings that make each evaluation short."""
ELSEWHERE = {"head", "multilabel", "detection", "instance", "semantic", "zero_shot"}
"""Need a saved head, several labels an image, scenes, or a text tower: their own tests show the same."""


@pytest.mark.parametrize("kind", sorted(set(EVALUATIONS) - ELSEWHERE))
def test_no_evaluation_changes_the_encoder(kind: str) -> None:
    encoder = random_encoder(CARD, seed=0)
    encoder.backbone.bn1.train()  # an unusual state, which must survive
    with torch.no_grad():
        encoder.backbone.bn1.running_mean.add_(0.1)
    (tensors, modes), draws = state(encoder), torch.get_rng_state()
    (result,) = evaluate(encoder, data="digits", on=[kind], settings={kind: SMALL.get(kind, {})})
    assert result.metrics
    after, modes_after = state(encoder)
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert modes_after == modes
    assert all(not p.requires_grad or p.grad is None for p in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_features_are_made_once_and_looked_up_afterwards(passes: list[int]) -> None:
    encoder = random_encoder(CARD, seed=0)
    source = open_source(DataConfig(name="digits"), "test", size=16)
    plain = features_of(encoder, source)
    passes.clear()
    first = cached_features(encoder, source)
    assert sum(passes) == len(source) + 1  # and one image that tells the width
    torch.testing.assert_close(first.x, plain.x, rtol=1e-5, atol=1e-5)
    assert torch.equal(first.y, plain.y)
    passes.clear()
    again = cached_features(random_encoder(CARD, seed=0), source)  # the same weights from elsewhere
    assert sum(passes) == 1
    assert torch.equal(again.x, first.x)
    assert not torch.equal(cached_features(random_encoder(CARD, seed=1), source).x, first.x)


def test_what_changes_features_changes_the_fingerprint() -> None:
    encoder = random_encoder(CARD, seed=0)
    known = encoder_fingerprint(encoder)
    assert encoder_fingerprint(random_encoder(CARD, seed=0)) == known
    assert encoder_fingerprint(random_encoder(CARD, seed=1)) != known
    with torch.no_grad():
        encoder.backbone.bn1.running_var.mul_(1.5)  # a buffer, not a parameter
    assert encoder_fingerprint(encoder) != known
    other = CARD.model_copy(update={"mean": (0.2, 0.3, 0.3)})
    assert encoder_fingerprint(random_encoder(other, seed=0)) != known


def test_a_killed_extraction_is_taken_up(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    import mvmr.representations.cache_store as store

    monkeypatch.setattr(store, "ROWS_PER_SHARD", 100)
    encoder = random_encoder(CARD, seed=0)
    source = open_source(DataConfig(name="digits"), "test", size=16)

    def killed(what: str, done: int, total: int) -> None:
        if done > 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_features(encoder, source, progress=killed)
    passes.clear()
    resumed = cached_features(encoder, source)
    assert sum(passes) == len(source) - 200 + 1  # two whole shards were there
    torch.testing.assert_close(resumed.x, features_of(encoder, source).x, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_when_not_wanted(tmp_path: Path) -> None:
    evaluate(random_encoder(CARD, seed=0), data="digits", keep_features=False)
    assert not list((tmp_path / "cache").glob("representations/*/shard-*"))


def test_intervals_stand_beside_accuracies() -> None:
    (result,) = evaluate(random_encoder(CARD, seed=0), data="digits", on=["knn"])
    outcomes = result.outcomes["top1"]
    assert outcomes.shape == (500,)
    assert set(outcomes.tolist()) <= {0.0, 100.0}
    assert float(outcomes.double().mean()) == pytest.approx(result.metrics["top1"])
    expected = mean_interval(outcomes)
    assert result.metrics["top1_low"] == pytest.approx(expected.low)
    assert result.metrics["top1_high"] == pytest.approx(expected.high)


def test_encoders_side_by_side_on_the_same_images(tmp_path: Path) -> None:
    encoders = [random_encoder(CARD, seed=seed) for seed in (0, 1, 2)]
    results = evaluate(encoders, data="digits", on=["knn", "linear_fast"], settings={"linear_fast.l2": 10.0})
    assert [(r.encoder, r.evaluation) for r in results] == [
        (f"encoder {number}", kind) for number in (1, 2, 3) for kind in ("knn", "linear_fast")
    ]
    alone = evaluate(encoders[1], data="digits", on=["knn"])[0]
    assert alone.metrics == results[2].metrics
    found = compare(results)
    assert {(d.encoder, d.evaluation, d.metric) for d in found} == {
        (f"encoder {n}", kind, top) for n in (2, 3) for kind in ("knn", "linear_fast") for top in ("top1", "top5")
    }
    expected = paired_interval(results[2].outcomes["top1"], results[0].outcomes["top1"])
    shown = next(d for d in found if (d.encoder, d.evaluation, d.metric) == ("encoder 2", "knn", "top1"))
    assert (shown.difference, shown.low, shown.high) == (expected.value, expected.low, expected.high)
    assert shown.difference == pytest.approx(results[2].metrics["top1"] - results[0].metrics["top1"])
    turned = compare(results, against="encoder 2")
    back = next(d for d in turned if (d.encoder, d.evaluation, d.metric) == ("encoder 1", "knn", "top1"))
    assert back.difference == pytest.approx(-shown.difference)


def test_what_is_no_mean_over_images_is_compared_too() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(200, generator=generator) + shift for shift in (0.0, 0.5)]

    def result(number: int) -> Result:
        def median(chosen: Tensor) -> float:
            return float(values[number][chosen].median())

        measured = {"median": median(torch.arange(200)), "alone": 1.0}
        statistics = {"median": median} | ({"alone": median} if number else {})
        return Result("e", "d", "test", measured, {}, f"{number}", 0.0, statistics=statistics, images=200)

    (found,) = compare([result(0), result(1)])
    expected = statistic_interval(
        lambda chosen: float(values[1][chosen].median()) - float(values[0][chosen].median()), 200, resamples=1000
    )
    assert (found.metric, found.encoder, found.against) == ("median", "1", "0")
    assert (found.difference, found.low, found.high) == (expected.value, expected.low, expected.high)
    assert found.is_certain == (expected.low > 0)
    assert compare([]) == []
    assert compare([result(0)]) == []


def test_finished_results_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [save_encoder(tmp_path / f"{seed}.safetensors", random_encoder(CARD, seed=seed).backbone, CARD)
             for seed in (0, 1)]  # fmt: skip
    given: dict[str, Any] = {"data": "digits", "on": ["knn", "retrieval"], "out": tmp_path / "out"}
    made = evaluate(files, **given, resume=True)
    assert len(list((tmp_path / "out").rglob("results/*.json"))) == 4

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("evaluated anew")

    monkeypatch.setattr(cached_module, "cache_representations", never)
    again = evaluate(files, **given, resume=True)
    assert [r.as_json() for r in again] == [r.as_json() for r in made]
    assert [(d.difference, d.low) for d in compare(again)] == [(d.difference, d.low) for d in compare(made)]
    with pytest.raises(AssertionError, match="anew"):  # other settings, other encoder, or not asked to
        evaluate(files, **given, resume=True, settings={"knn.k": 5})
    with pytest.raises(AssertionError, match="anew"):
        evaluate(files, **given)
    save_encoder(files[0], random_encoder(CARD, seed=7).backbone, CARD)
    with pytest.raises(AssertionError, match="anew"):
        evaluate(files, **given, resume=True)


def test_a_damaged_result_is_made_anew(tmp_path: Path) -> None:
    encoder = random_encoder(CARD, seed=0)
    (made,) = evaluate(encoder, data="digits", out=tmp_path)
    path = tmp_path / "encoder/results/knn-digits.json"
    assert read_result(path, made.fingerprint) is not None
    assert read_result(path, "other") is None
    path.with_suffix(".safetensors").write_bytes(b"x")
    assert read_result(path, made.fingerprint) is None
    path.write_text(json.dumps([1]))
    assert read_result(path, made.fingerprint) is None
    assert evaluate(encoder, data="digits", out=tmp_path, resume=True)[0].metrics == made.metrics


def test_mistakes_are_named_before_any_work(tmp_path: Path, passes: list[int]) -> None:
    file = save_encoder(tmp_path / "a.safetensors", random_encoder(CARD, seed=0).backbone, CARD)
    with pytest.raises(UserError, match="given twice"):
        evaluate([file, str(file)], data="digits")
    with pytest.raises(UserError, match="no encoder"):
        evaluate([], data="digits")
    with pytest.raises(UserError, match="nowhere"):
        evaluate([file, tmp_path / "nowhere"], data="digits")
    assert passes == []


def test_a_fixed_map_stands_in_an_encoders_place() -> None:
    results = evaluate(["representation:pixels", random_encoder(CARD, seed=0)], data="digits", on=["knn"])
    train, test = (open_source(DataConfig(name="digits"), split, size=16) for split in ("train", "test"))
    known = DATASETS["digits"]
    (x, y), (x_test, y_test) = (
        ((s.images.float() / 255 - torch.tensor(known.mean).view(3, 1, 1)).flatten(1), s.labels) for s in (train, test)
    )
    expected = KNeighborsClassifier(1, metric="cosine").fit(x.numpy(), y).score(x_test.numpy(), y_test)
    (nearest,) = evaluate("representation:pixels", data="digits", on=["knn"], settings={"knn.k": 1})
    assert nearest.metrics["top1"] == pytest.approx(100 * expected, abs=0.4)  # grey pixels with one deviation
    assert {d.against for d in compare(results)} == {"representation:pixels"}
    with pytest.raises(UserError, match=r"no such representation.*pixels"):
        evaluate("representation:pixel", data="digits")
    with pytest.raises(UserError, match="--data is missing"):
        evaluate("representation:pixels")
    with pytest.raises(UserError, match="no weights to draw"):
        evaluate("representation:pixels", data="digits", random=True)
