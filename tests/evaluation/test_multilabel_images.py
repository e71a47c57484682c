"""Multi-label classification from files of VOC2007's layout on, against a plain computation."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from data.voc_files import Objects, objects_by_search, official_value, write_voc
from evaluation.plain_precision import by_definition
from evaluation.scikit_scores import scikit_scores
from mvmr.api import evaluate
from mvmr.data.images import FileSource
from mvmr.data.sources import DataConfig, open_source
from mvmr.data.voc import VOC_CLASSES
from mvmr.evaluation.features import features_of
from mvmr.evaluation.multilabel import MultilabelConfig, multilabel
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, load_encoder, random_encoder


def made_tree(root: Path) -> None:
    """Ninety small images of four classes, with difficult objects among them."""
    generator = np.random.default_rng(5)
    splits: list[dict[str, Objects]] = [{}, {}]
    for number in range(90):
        drawn: Objects = []
        for of_class in ("bicycle", "bird", "boat", "dog"):
            if generator.random() < 0.35:
                drawn += [(of_class, int(flag)) for flag in generator.random(generator.integers(1, 3)) < 0.3]
        splits[number >= 60][f"{number:06d}"] = drawn
    write_voc(root, *splits, lists=True)


def small_encoder() -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(width=0.125, stem="cifar"), dim=64, image_size=16,
        mean=(0.5,) * 3, std=(0.2,) * 3, method="mvmr", data="voc07", version="0.1.0",
    )  # fmt: skip
    return random_encoder(card, 0)


def check_against_plain_computation(encoder: Encoder, root: Path, l2: float) -> dict[str, float]:
    """Both mAPs again from labels found by text search, scikit-learn's classifiers and the plain loop."""
    sources = [open_source(DataConfig(name="voc07", root=root), split, size=16) for split in ("train", "test")]
    parts = [features_of(encoder, source) for source in sources]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="left out of the mean")
        metrics = multilabel(parts[0], parts[1], MultilabelConfig(l2=l2))
    columns: list[list[list[int]]] = []
    for source in sources:
        assert isinstance(source, FileSource)
        objects = [objects_by_search(source.locate(index)) for index in range(len(source))]
        value = {1: 1, -1: 0, 0: -1}
        columns.append([[value[official_value(of_image, name)] for of_image in objects] for name in VOC_CLASSES])
    values: dict[str, list[float]] = {"voc07": [], "all": []}
    for own, theirs in zip(*columns, strict=True):
        if not ({0, 1} <= set(own) and 1 in theirs):
            continue
        scores = scikit_scores(parts[0].x.numpy(), np.array(own)[:, None], parts[1].x.numpy(), l2)[:, 0].tolist()
        for definition, of_classes in values.items():
            of_classes.append(100 * by_definition(scores, theirs, definition))
    assert metrics["map11"] == pytest.approx(np.mean(values["voc07"]), abs=1e-6)
    assert metrics["map"] == pytest.approx(np.mean(values["all"]), abs=1e-6)
    assert len(values["all"]) == sum(name.startswith("ap11/") for name in metrics)
    return metrics


def test_both_means_on_a_tree_of_the_official_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))
    made_tree(tmp_path)
    encoder = small_encoder()
    metrics = check_against_plain_computation(encoder, tmp_path, 10.0)
    assert {name for name in metrics if "/" in name} == {f"ap11/{name}" for name in ("bicycle", "bird", "boat", "dog")}
    with pytest.warns(UserWarning, match="left out of the mean.*aeroplane, bottle"):
        (result,) = evaluate(encoder, data="voc07", root=tmp_path, on=["multilabel"], settings={"multilabel.l2": 10.0})
    ends = {f"{name}_{end}" for name in ("map11", "map", "auc") for end in ("low", "high")}
    assert set(result.metrics) == {*metrics, *ends}
    assert {name: result.metrics[name] for name in metrics} == pytest.approx(metrics, abs=1e-6)
    for name in ("map11", "map"):
        assert 0 <= result.metrics[f"{name}_low"] <= metrics[name] <= result.metrics[f"{name}_high"] <= 100


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA, a folder with VOCdevkit, is not set")
def test_both_means_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))
    encoder = load_encoder("torchvision:resnet18@random")
    metrics = check_against_plain_computation(encoder, Path(os.environ["MVMR_TEST_DATA"]), 100.0)
    print({name: round(value, 3) for name, value in metrics.items()})
