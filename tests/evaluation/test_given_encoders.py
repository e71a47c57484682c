"""Which encoders `evaluate` is given, on which data, under which names: told apart, or refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sklearn.neighbors import KNeighborsClassifier

import mvmr.api as api
from mvmr.api import data_config, evaluate
from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig, open_source
from mvmr.errors import UserError
from mvmr.evaluation.comparison import compare
from mvmr.nets.released import ReleasedInput
from mvmr.nets.weights import Encoder, load_encoder, random_encoder, save_encoder
from states import CARD


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(folder: str, config: Any = None, *, seed: int = 0, size: int = 16) -> Path:
    """A run folder with an encoder and a config.yaml."""
    path = Path(folder)
    path.mkdir(parents=True)
    card = CARD.model_copy(update={"image_size": size})
    save_encoder(path / "encoder.safetensors", random_encoder(card, seed=seed).backbone, card)
    (path / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}} if config is None else config))
    return path


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(self: Encoder, images: torch.Tensor) -> None:
        raise AssertionError("an encoder was used")

    monkeypatch.setattr(Encoder, "normalised", called)


@pytest.mark.usefixtures("unused")
def test_mistakes_are_named_before_any_work() -> None:
    a, b = run("runs/a"), run("runs-a")
    for one, other in ((a, str(a)), ("runs/a", "./runs/a"), ("runs/a", "runs/a/"), (a, a.resolve())):
        with pytest.raises(UserError, match="given twice"):
            evaluate([one, other], data="digits")
    with pytest.raises(UserError, match="no encoder"):
        evaluate([], data="digits")
    with pytest.raises(UserError, match="nowhere"):
        evaluate([a, "nowhere"], data="digits")
    with pytest.raises(UserError, match="nowhere"):
        evaluate("nowhere")
    with pytest.raises(UserError, match="results of runs/a and runs-a would both lie in out/runs-a"):
        evaluate([a, b], out="out")
    with pytest.raises(UserError, match=r"knn\.k: no effect"):
        evaluate(a, on=["linear_fast"], settings={"knn.k": 3})
    with pytest.raises(UserError, match="random: given twice"):
        evaluate([a, run("random")], random=True)


def test_a_run_that_is_called_random_is_none() -> None:
    folder = run("random")
    (result,) = evaluate("random")
    assert result.encoder == "random"
    assert [path.name for path in (folder / "results").glob("*.json")] == ["knn-digits.json"]


def test_encoders_of_different_sizes_stand_side_by_side() -> None:
    results = evaluate([run("a"), run("b", size=8)], on=["knn"])
    alone = evaluate("b", on=["knn"])
    assert results[1].metrics == alone[0].metrics != results[0].metrics


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


def test_the_random_net_is_that_of_the_first_network_and_data_those_of_the_first_run() -> None:
    results = evaluate(["representation:pixels", run("runs/a"), run("runs/b", seed=1)], random=True)
    assert [r.encoder for r in results] == ["representation:pixels", "runs/a", "runs/b", "random"]
    assert {r.data for r in results} == {"digits"}
    (expected,) = evaluate(random_encoder(CARD, seed=0), data="digits")
    assert results[3].metrics == expected.metrics


def test_a_released_checkpoint_beside_a_run_takes_its_datas_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ReleasedInput | None] = []

    def loaded(path: str | Path, *, released: ReleasedInput | None = None) -> Encoder:
        seen.append(released)
        return load_encoder("runs/a")

    run("runs/a")
    monkeypatch.setattr(api, "load_encoder", loaded)
    evaluate(["runs/a", "published.ckpt"])
    known = DATASETS["digits"]
    assert seen == [ReleasedInput(known.size, known.mean, known.std)] * 2


def test_a_recipe_without_the_datas_name_means_the_runs() -> None:
    folder = run("runs/a", {"data": {"name": "cifar10", "root": "there", "limit": 64, "workers": 1}})
    own = DataConfig(name="cifar10", root=Path("there"), workers=1)
    assert data_config(folder, None, None) == own
    assert data_config(folder, None, None, {"workers": 4}) == own.model_copy(update={"workers": 4})
    assert data_config(folder, "digits", None, {"workers": 4}) == DataConfig(name="digits", workers=4)
    assert data_config(folder, "cifar10", "here", {"name": "digits", "workers": 4}) == own.model_copy(
        update={"root": Path("here")}
    )
    with pytest.raises(UserError, match="--data is missing"):
        data_config(random_encoder(CARD, seed=0), None, None, {"workers": 4})


@pytest.mark.parametrize(
    ("content", "proposed", "said"),
    [
        ("", {}, "--data is missing"),
        ("data:", {}, "--data is missing"),
        ("[1]", {}, "--data is missing"),
        ("a: b: c", {}, r"config.yaml: not valid YAML"),
        ("data: {name: cifar1}", {}, r"data\.name: .*cifar10.*; mend the data section"),
        ("data: {name: digits}", {"name": "cifar1"}, r"data\.name: .*did you mean"),
        ("data: {name: digits}", {"colour": 3}, r"data\.colour: Extra inputs"),
    ],
)
def test_mistakes_in_a_data_section_are_named(content: str, proposed: dict[str, Any], said: str) -> None:
    folder = run("runs/a")
    (folder / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=said):
        data_config(folder, None, None, proposed)
