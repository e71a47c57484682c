"""Epochs that are drawn by weights: how often, of what, and with which views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvmr.config import load
from mvmr.data.batches import BatchMaker
from mvmr.data.images import ArraySource, FileSource
from mvmr.data.loading import Loaded, Loader, times_before, weighted_draw
from mvmr.data.views import ViewMaker
from mvmr.ops.labels import uniform_over_labels


def pixels_of(batch: Loaded) -> Tensor:
    assert isinstance(batch.images, Tensor)
    return batch.images


def test_weights_are_read_when_an_epoch_starts(array: ArraySource) -> None:
    weights: list[Tensor | None] = [None]
    asked: list[int] = []

    def current() -> Tensor | None:
        asked.append(1)
        return weights[0]

    loader = Loader(array, batch_size=4, seed=0, weights=current)
    iterator = iter(loader)
    assert not asked
    weights[0] = torch.zeros(22)
    weights[0][[3, 5]] = torch.tensor([1.0, 3.0])
    assert set(torch.cat([batch.index for batch in iterator]).tolist()) <= {3, 5}
    assert len(asked) == 1
    weights[0] = None
    assert len(set(torch.cat([batch.index for batch in loader]).tolist())) == 20


def test_weighted_draws_follow_their_weights() -> None:
    weights = torch.arange(4.0).repeat(5000)  # classes 0 ... 3 at 0 : 1 : 2 : 3
    drawn = weighted_draw(1, 2, weights)
    counts = torch.bincount(drawn % 4, minlength=4) / len(weights)
    assert counts[0] == 0
    assert counts.tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6], abs=0.02)  # 5 standard deviations
    assert torch.equal(drawn, weighted_draw(1, 2, weights))
    assert not torch.equal(drawn, weighted_draw(1, 3, weights))
    for wrong in (torch.zeros(4), torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="weights must be"):
            weighted_draw(0, 0, wrong)


def test_times_before_count_earlier_places() -> None:
    order = torch.tensor([3, 1, 3, 3, 0, 1])
    assert times_before(order).tolist() == [0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_drawn_again_in_an_epoch_has_another_view(files: FileSource, workers: int) -> None:
    weights = torch.ones(22)
    views = ViewMaker(load("mvmr_folder").views, mean=(0.5,) * 3, std=(0.5,) * 3, seed=0)
    maker = BatchMaker(views, nn.ModuleDict())
    loader = Loader(files, batch_size=11, seed=0, workers=workers, start=views.start, weights=lambda: weights)
    made = [(batch.index, batch.drawn, maker(batch)) for batch in loader]
    index, drawn = (torch.cat(parts) for parts in list(zip(*made, strict=True))[:2])
    assert torch.equal(index, weighted_draw(0, 0, weights)), "labels and lookups know the image by its position"
    assert len(drawn.unique()) == len(drawn) > len(index.unique())
    views_of = torch.cat([batch.views["global"][0] for _, _, batch in made])
    plain_of = torch.cat([batch.views["plain"][0] for _, _, batch in made])
    again = int((drawn >> 32).argmax())
    first = int((index == index[again]).nonzero()[0])
    assert again != first
    assert torch.equal(plain_of[again], plain_of[first])
    assert not torch.equal(views_of[again], views_of[first])
    loader.set_epoch(0)
    assert torch.equal(torch.cat([maker(batch).views["global"][0] for batch in loader]), views_of)


def test_what_is_trained_on_comes_equally_from_all_labels() -> None:
    """Counted on the pixels, which tell the image, and the label of the index beside them: not the sampler's word."""
    sizes = torch.tensor([1, 3, 10, 60, 400, 1526])
    labels = torch.arange(6).repeat_interleave(sizes)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    number = torch.arange(2000)
    pixels = torch.stack([number // 256, number % 256, labels], dim=1).to(torch.uint8)  # [N, 3]
    source = ArraySource(pixels[:, :, None, None].expand(-1, -1, 8, 8).contiguous(), None, name="numbered")
    loader = Loader(source, batch_size=50, seed=0, weights=lambda: uniform_over_labels(labels))
    counts = torch.zeros(6)
    for batch in (batch for _ in range(5) for batch in loader):
        seen = pixels_of(batch)[:, :, 0, 0].long()
        assert torch.equal(seen[:, 0] * 256 + seen[:, 1], batch.index)
        assert torch.equal(labels[batch.index], seen[:, 2])
        counts += seen[:, 2].bincount(minlength=6)
    assert counts.sum() == 10_000
    assert (counts - 10_000 / 6).abs().max() < 5 * (10_000 * 5 / 36) ** 0.5
