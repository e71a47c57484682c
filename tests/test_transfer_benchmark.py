"""benchmarks/transfer.py: what tells its cells apart, and how its rows and table come from them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transfer import RANDOM, TRAINING, cell, job, key, resampled_metrics, row, table

from mvmr.evaluation.measured import Metrics
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import random_encoder, save_encoder
from scene_files import write_coco, write_voc_squares

CARD = EncoderCard(
    encoder=EncoderConfig(width=0.0625, stem="cifar"), dim=32, image_size=32, mean=(0.4,) * 3, std=(0.2,) * 3,
    method="m", data="d", version="0",
)  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        encoders=[], voc=write_voc_squares(tmp_path / "voc"), coco=write_coco(tmp_path / "coco", train=TRAINING + 2),
        out=tmp_path / "out", on=["semantic"], seeds=[0], head="c4", all_classes=False, iterations=3,
    )  # fmt: skip


def test_all_that_matters_is_in_a_cells_key(arguments: argparse.Namespace) -> None:
    encoder = random_encoder(CARD, seed=0)

    def key_of(task: str, net: Encoder = encoder, seed: int = 0, **changes: Any) -> str:
        return key(task, net, *job(task, argparse.Namespace(**{**vars(arguments), **changes}), seed))

    for task in ("detection", "instance", "semantic"):
        known = key_of(task)
        assert key_of(task, out=arguments.out / "elsewhere") == known
        others = [
            key_of(task, seed=1), key_of(task, iterations=4), key_of(task, all_classes=True),
            key_of(task, random_encoder(CARD, seed=1)),
            key_of(task, Encoder(encoder.backbone, CARD.model_copy(update={"mean": (0.1,) * 3}))),
        ]  # fmt: skip
        assert len({known, *others}) == 6
    assert key_of("detection", head="fpn") != key_of("detection")
    before = [key_of(task) for task in ("detection", "instance", "semantic")]
    file = arguments.coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"][2] += 1
    file.write_text(json.dumps(content))
    listed = arguments.voc / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    assert not set(before) & {key_of(task) for task in ("detection", "instance", "semantic")}


def test_a_finished_cell_is_read(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def measured(encoder: Encoder, data: Any, config: Any, workplace: Any) -> Metrics:
        seen.append(encoder)
        return Metrics({"miou": 5.0}, outcomes={"miou": torch.tensor([4.0, 6.0])})

    monkeypatch.setitem(cell.__globals__["TASKS"], "semantic", measured)
    files = [str(save_encoder(tmp_path / f"{n}" / "e.safetensors", random_encoder(card, seed=n).backbone, card))
             for n, card in enumerate((CARD, CARD.model_copy(update={"dim": 64, "encoder": EncoderConfig(
                 width=0.125, stem="cifar")})))]  # fmt: skip
    arguments.encoders = [RANDOM, files[0]]
    first = cell("semantic", RANDOM, 0, arguments)
    assert cell("semantic", RANDOM, 0, arguments) == first
    assert len(seen) == 1
    assert len(first["resampled"]["miou"]) == 1000
    assert set(first["resampled"]["miou"]) == {4.0, 5.0, 6.0}
    arguments.encoders = [RANDOM, files[1]]  # a random net of another width
    cell("semantic", RANDOM, 0, arguments)
    cell("semantic", files[1], 0, arguments)
    assert [encoder.card.dim for encoder in seen] == [32, 64, 64]


def test_rows_and_table() -> None:
    def made(name: str, values: list[float], at: float) -> dict[str, Any]:
        return {
            "encoder": name,
            "metrics": {"miou": at, "loss_last": 1.0, "n_train": 9.0},
            "resampled": {"miou": values},
        }

    own = [made("a", [10.0, 12.0, 14.0], 11.0), made("a", [20.0, 22.0, 24.0], 21.0)]
    random = [made(RANDOM, [5.0, 5.0, 5.0], 5.0), made(RANDOM, [5.0, 7.0, 5.0], 6.0)]
    rows = [row("semantic", RANDOM, random, random), row("semantic", "a", own, random)]
    assert "ahead" not in rows[0]
    assert rows[1]["mean"]["miou"] == 16.0
    ahead = rows[1]["ahead"]["miou"]
    assert (ahead["mean"], ahead["of_seeds"]) == (10.5, [6.0, 15.0])
    assert ahead["low"] == pytest.approx(10 + 0.05)  # of 10, 11 and 14
    assert ahead["high"] == pytest.approx(14 - 0.15)
    lines = table(rows).splitlines()
    assert lines[0] == "| semantic | miou | loss_last | miou over random (95 %) |"
    assert lines[2] == "| random | 5.50 | 1.00 |  |"
    assert lines[3] == "| a | 16.00 | 1.00 | +10.50 (+10.05 to +13.85) |"


def test_resamples_are_the_same_for_all() -> None:
    values = torch.arange(20.0)
    first = resampled_metrics(Metrics({}, outcomes={"a": values}))
    second = resampled_metrics(
        Metrics({}, statistics={"a": lambda index: float(values[index].double().mean())}, images=20)
    )
    assert first["a"] == pytest.approx(second["a"])
    assert resampled_metrics(Metrics({"a": 1.0})) == {}
