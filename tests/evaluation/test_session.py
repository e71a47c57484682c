"""One command, several encoders: features are made once, results are kept and taken up, and nothing is changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mvmr.evaluation.cached_features as cached_module
from mvmr.api import embed, evaluate
from mvmr.data.sources import DataConfig, open_source
from mvmr.errors import RunError
from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.cached_features import cached_features, encoder_fingerprint
from mvmr.evaluation.comparison import compare
from mvmr.evaluation.features import features_of
from mvmr.evaluation.intervals import mean_interval, paired_interval
from mvmr.evaluation.results import read_result
from mvmr.nets.weights import Encoder, random_encoder, save_encoder
from mvmr.representations.cache_store import REMEDY
from states import CARD


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


@pytest.mark.parametrize(
    ("kind", "settings", "images"),
    [
        ("clustering", {"starts": 1, "iterations": 2}, 500),
        ("clustering", {"starts": 1, "iterations": 2, "fit": "train"}, 1797),
        ("retrieval", {"gallery": "test"}, 500),
        ("knn", {}, 1797),
        ("diagnostics", {"images": 64, "pair_images": 16, "view_images": 0, "representations": ["pixels"]}, 64),
    ],
)
def test_only_what_is_looked_at_is_extracted(
    kind: str, settings: dict[str, Any], images: int, passes: list[int]
) -> None:
    evaluate(random_encoder(CARD, seed=0), data="digits", on=[kind], settings={kind: settings})
    assert sum(passes) == images


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
    file = save_encoder(tmp_path / "a.safetensors", random_encoder(CARD, seed=0).backbone, CARD)
    (made,) = evaluate(file, data="digits", out=tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("results/knn-digits.json")
    assert read_result(path, made.fingerprint) is not None
    path.with_suffix(".safetensors").write_bytes(b"x")
    assert evaluate(file, data="digits", out=tmp_path / "out", resume=True)[0].metrics == made.metrics
    assert read_result(path, made.fingerprint) is not None


def test_what_python_changed_is_always_computed_anew(tmp_path: Path) -> None:
    """A hook is in no key: were its features kept under the weights' key, they would be taken for the file's."""
    encoder = random_encoder(CARD, seed=1)
    file = save_encoder(tmp_path / "a.safetensors", encoder.backbone, CARD)
    given: dict[str, Any] = {"data": "digits", "on": ["knn"], "out": tmp_path / "out", "resume": True}
    (plain,) = evaluate(file, **given)
    handle = encoder.backbone.register_forward_hook(lambda net, images, made: made[:, :2])
    (hooked,) = evaluate(encoder, **given)
    assert hooked.metrics["top1"] < plain.metrics["top1"] - 5
    (again,) = evaluate(encoder, **given)
    assert again.metrics == hooked.metrics
    assert (hooked.fingerprint, again.fingerprint) == ("", "")
    assert json.loads((tmp_path / "out/encoder/results/knn-digits.json").read_text())["fingerprint"] == ""
    handle.remove()
    (free,) = evaluate(encoder, **given)
    assert free.metrics == pytest.approx(plain.metrics, abs=0.5)
    assert embed(file, data="digits", split="test").x.shape == (500, 32)
    encoder.backbone.register_forward_hook(lambda net, images, made: made[:, :2])
    assert embed(encoder, data="digits", split="test").x.shape == (500, 2)


def test_a_diverged_encoder_is_called_so(tmp_path: Path) -> None:
    encoder = random_encoder(CARD, seed=0)
    with torch.no_grad():
        encoder.backbone.bn1.weight.fill_(torch.nan)
    source = open_source(DataConfig(name="digits"), "test", size=16)
    with pytest.raises(RunError, match=r"^features of digits/test are not finite: the encoder has diverged$"):
        cached_features(encoder, source)


def test_a_full_disk_is_told_with_the_commands_own_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise RunError(f"cache: 3 GB more needed; {REMEDY}. Finished parts are kept")

    monkeypatch.setattr(cached_module, "cache_representations", full)
    source = open_source(DataConfig(name="digits"), "test", size=16)
    with pytest.raises(RunError, match=r"make room there, or evaluate with --no-keep-features\. Finished") as error:
        cached_features(random_encoder(CARD, seed=0), source)
    assert "cache=off" not in str(error.value)
