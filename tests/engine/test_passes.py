"""Passes over the data set: every image once, in calls that the ranks have in common, and representations beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.data.batches import BatchMaker
from mvmr.data.sources import ArraySource
from mvmr.data.views import ViewMaker
from mvmr.engine.passes import DataPass
from mvmr.engine.train import assemble, build
from mvmr.errors import UserError
from mvmr.ops.batch_norm import synchronise_batch_norm
from mvmr.ops.random import permutation
from ranks import run_on_ranks
from tiny import tiny


def images(count: int) -> ArraySource:
    pixels = torch.randint(256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ArraySource(pixels, None, name="noise")


def pass_over(count: int, rank: int = 0, ranks: int = 1) -> DataPass:
    run = tiny(views={"recipe": "mvmr", "size": 4})
    maker = BatchMaker(ViewMaker(run.views, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), seed=0), nn.ModuleDict())
    return DataPass(images(count), run, maker, torch.device("cpu"), rank, ranks)


def normalised(source: ArraySource, run: Any) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (run.data.mean, run.data.std))
    return (source.images.float() / 255 - mean) / std


@pytest.mark.parametrize("count", [5, 512, 513, 1025])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_every_call(count: int, ranks: int) -> None:
    seen: list[list[Tensor]] = []
    rows = torch.full((count, 48), torch.nan)
    for rank in range(ranks):
        calls: list[Tensor] = []
        over = pass_over(count, rank, ranks)
        index, features = over(lambda x, calls=calls: (calls.append(x), x.flatten(1))[1])
        assert torch.equal(index, permutation(over.run.seed, 0, count)[rank::ranks]), "not in the order of the files"
        rows[index] = features
        seen.append(calls)
    source = over.source
    assert isinstance(source, ArraySource)
    expected = normalised(source, over.run)
    assert torch.equal(rows, expected.flatten(1)), "every image once, in its place"
    assert len({len(calls) for calls in seen}) == 1, "equally often on every rank"
    assert all(len(x) for calls in seen for x in calls), "and never without an image"
    whole: list[Tensor] = []
    pass_over(count)(lambda x: (whole.append(x), x.flatten(1))[1])
    for number, alone in enumerate(whole):
        together = torch.cat([calls[number] for calls in seen])
        assert len(together) == len(alone) <= 512
        assert {row.numpy().tobytes() for row in together} == {row.numpy().tobytes() for row in alone}


def statistics(rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)).double()
    if ranks > 1:
        synchronise_batch_norm(net)
    index, features = pass_over(601, rank, ranks)(lambda x: net(x.double()))
    return index, features, net[1].running_mean


def test_batch_norm_in_train_mode_sees_the_same_images_on_any_number_of_ranks() -> None:
    order, features, mean = statistics(0, 1)
    expected = torch.empty_like(features)
    expected[order] = features
    for index, features, found in run_on_ranks(statistics, 2, 2):
        torch.testing.assert_close(features, expected[index], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_representations_are_those_of_the_batches(cache: str, tmp_path: Path) -> None:
    teachers = {"vit": {"kind": "teacher", "model": "timm:test_vit@random"}, "hog": {"bins": 8, "cell": 4}}
    settings = {"enabled": cache == "on", "dtype": "float32"}
    run = tiny(representations=teachers, cache=settings, data__cache=str(tmp_path / "cache"))
    parts = build(run)
    _, _, data = assemble(run, parts, tmp_path, quiet=True)
    data.weights = None  # no engine runs here
    assert data.prepare is not None
    data.prepare()
    assert sorted(parts.maker.kept) == (["hog", "vit"] if cache == "on" else [])
    loaded = next(iter(data.loader()))
    batch = parts.maker(loaded)
    for name, expected in batch.representations.items():
        rows = torch.full((96, expected.shape[1]), torch.nan)
        for rank in range(2):
            over = DataPass(parts.source, run, parts.maker, torch.device("cpu"), rank, 2)
            index, found = over.representation(name)
            assert torch.equal(index, torch.arange(rank, 96, 2))
            assert found.dtype == torch.float32
            rows[index] = found
        torch.testing.assert_close(rows[loaded.index], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"none is named 'clip'; there are vit, hog"):
        over.representation("clip")
