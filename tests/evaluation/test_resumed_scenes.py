"""Finished results on scenes are taken up only where annotations, images and named files are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mvmr.evaluation.session as module
from mvmr.api import evaluate
from mvmr.data.sources import DataConfig, open_source
from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.resume import FILE
from mvmr.evaluation.session import Session
from mvmr.evaluation.zero_shot import ZeroShotConfig
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import random_encoder, save_encoder
from mvmr.types import Result
from scene_files import write_coco

CARD = EncoderCard(
    encoder=EncoderConfig(width=0.0625, stem="cifar"), dim=32, image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3,
    method="m", data="d", version="0",
)  # fmt: skip
DETECTOR: dict[str, Any] = {
    "iterations": 1, "batch_size": 2, "min_size": 32, "max_size": 48, "train_sizes": [32], "anchors_per_image": 8,
    "regions_per_image": 8, "proposals": 8, "precise_batch_norm": 0, "head": "fpn", "levels": [3, 4],
    "pyramid_width": 8, "hidden": 8,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "detection": DETECTOR,
    "instance": {**DETECTOR, "mask_layers": [4]},
    "semantic": {"iterations": 1, "batch_size": 2, "crop": 40, "head_channels": 4, "dilation": "none"},
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mvmr.evaluation.measured.RESAMPLES", 3)
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_other_annotations_or_images_are_evaluated_anew(kind: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data", train=4, val=2)
    files = [root / "annotations" / f"instances_{split}.json" for split in ("train2017", "val2017")]
    own = tmp_path / "own.json"
    own.write_bytes(files[0].read_bytes())
    settings = {kind: {**SETTINGS[kind], "train_annotations": own}}
    told: list[str] = []
    encoder = save_encoder(tmp_path / "e.safetensors", random_encoder(CARD, seed=0).backbone, CARD)

    def evaluated() -> Result:
        told.clear()
        (result,) = evaluate(
            encoder, data="coco", root=root, on=[kind], settings=settings, out=tmp_path / "out",
            resume=True, progress=lambda what, done, total: told.append(what),
        )  # fmt: skip
        return result

    made = evaluated()
    assert any(what.startswith("training") for what in told)
    assert evaluated().as_json() == made.as_json()
    assert told == []
    changed(own, lambda content: content["annotations"].pop())
    again = evaluated()
    assert any(what.startswith("training") for what in told)
    assert again.fingerprint != made.fingerprint
    changed(
        files[1],
        lambda content: content["annotations"][0].update(category_id=33 - content["annotations"][0]["category_id"]),
    )
    third = evaluated()
    assert any(what.startswith(("testing", "detecting")) for what in told)
    assert third.fingerprint != again.fingerprint
    picture = root / "val2017" / "000001.png"
    picture.write_bytes(picture.read_bytes() + b"\0")  # another size is another image
    assert evaluated().fingerprint != third.fingerprint
    assert evaluated().fingerprint == evaluated().fingerprint


def test_the_training_is_kept_until_the_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path / "data", train=4, val=2)
    given: dict[str, Any] = {
        "data": "coco",
        "root": root,
        "on": ["semantic"],
        "settings": {"semantic": SETTINGS["semantic"]},
    }
    encoder, out = (
        save_encoder(tmp_path / "e.safetensors", random_encoder(CARD, seed=0).backbone, CARD),
        tmp_path / "out",
    )

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    for place in ("with_intervals", "write_result"):
        with monkeypatch.context() as patched:
            patched.setattr(module, place, killed)
            with pytest.raises(KeyboardInterrupt):
                evaluate(encoder, **given, out=out)
        (kept,) = out.rglob(FILE)
        assert kept.parent.name == "semantic-coco"
    told: list[str] = []
    (result,) = evaluate(encoder, **given, out=out, progress=lambda what, *_: told.append(what))
    assert set(told) == {"testing on label maps"}
    assert sorted(file.name for file in kept.parent.iterdir()) == ["segmenter.safetensors"]
    (whole,) = evaluate(encoder, **given)
    assert result.metrics == whole.metrics


def fingerprint(encoder: Encoder, kind: str, config: Any, **sources: Any) -> str:
    session = Session(
        data=DataConfig(name="digits"), evaluations={}, device=torch.device("cpu"),
        sources={(split, CARD.image_size): source for split, source in sources.items()},
    )  # fmt: skip
    return session._fingerprint(encoder, kind, config)


def test_named_files_and_labels_count(tmp_path: Path) -> None:
    encoder, names = random_encoder(CARD, seed=0), tmp_path / "names.txt"
    config = ZeroShotConfig(class_names=names)
    absent = fingerprint(encoder, "zero_shot", config)
    names.write_text("cat\n")
    first = fingerprint(encoder, "zero_shot", config)
    names.write_text("dog\n")
    assert len({absent, first, fingerprint(encoder, "zero_shot", config)}) == 3
    names.write_text("cat\n")
    assert fingerprint(encoder, "zero_shot", config) == first

    knn = EVALUATIONS["knn"].config()
    plain = fingerprint(encoder, "knn", knn)
    test = open_source(DataConfig(name="digits"), "test", size=CARD.image_size)
    assert fingerprint(encoder, "knn", knn, test=test) == plain
    assert test.labels is not None
    test.labels = test.labels.flip(0)  # of the same images
    assert fingerprint(encoder, "knn", knn, test=test) != plain


def test_every_evaluation_on_scenes_tells_what_it_sees() -> None:
    for name, entry in EVALUATIONS.items():
        assert (entry.fingerprints is not None) == (entry.on == "scenes"), name
