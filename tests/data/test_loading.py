"""The order of images is a function of (seed, epoch): for every number of workers and ranks, and after any restart."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvmr.data.images import ArraySource, FileSource
from mvmr.data.loading import Loaded, Loader, plain_batches
from mvmr.data.store import prepare
from mvmr.data.view_ops import plain
from mvmr.errors import RunError, UserError


def crops(image: Tensor, index: int, epoch: int) -> dict[str, Tensor]:
    """A worker's part of views that depends on all that it may."""
    float_crop = torch.nn.functional.interpolate(image[None].float(), (6, 6), mode="bilinear", antialias=True)[0]
    return {"plain": float_crop.round().to(torch.uint8), "global/0": image[:, :5, :5] + (7 * index + epoch) % 256}


def images_of(batch: Loaded) -> dict[str, Tensor]:
    return batch.images if isinstance(batch.images, dict) else {"all": batch.images}


def same(first: list[Loaded], second: list[Loaded]) -> bool:
    return len(first) == len(second) and all(
        a.epoch == b.epoch
        and torch.equal(a.index, b.index)
        and images_of(a).keys() == images_of(b).keys()
        and all(torch.equal(x, images_of(b)[name]) for name, x in images_of(a).items())
        for a, b in zip(first, second, strict=True)
    )


def epochs(loader: Loader, count: int) -> list[Loaded]:
    return [batch for _ in range(count) for batch in loader]


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own(array: ArraySource) -> None:
    loader = Loader(array, batch_size=4, seed=3)
    assert len(loader) == 5
    first, second = list(loader), list(loader)
    assert [batch.epoch for batch in (*first, *second)] == [0] * 5 + [1] * 5
    orders = [torch.cat([batch.index for batch in epoch]).tolist() for epoch in (first, second)]
    assert all(len(set(order)) == 20 for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != torch.cat([batch.index for batch in Loader(array, batch_size=4, seed=4)]).tolist()
    for batch in first:
        assert isinstance(batch.images, Tensor)
        assert (batch.images[:, 0, 0, 0] == batch.index).all()
        assert batch.images.shape == (4, 3, 4, 4)


def test_files_are_the_same_with_and_without_workers(files: FileSource) -> None:
    alone, helped = (epochs(Loader(files, batch_size=5, seed=1, workers=w, start=crops), 2) for w in (0, 2))
    assert len(alone) == 8
    assert same(alone, helped)
    for batch in alone:
        for row, index in enumerate(batch.index.tolist()):
            expected = crops(files.read(index), index, batch.epoch)
            assert all(torch.equal(images_of(batch)[name][row], crop) for name, crop in expected.items())


def test_a_mapped_array_is_the_same_with_and_without_workers(files: FileSource, tmp_path: Path) -> None:
    mapped = prepare(files, size=8, cache=tmp_path)
    assert same(*(epochs(Loader(mapped, batch_size=5, seed=1, workers=w), 2) for w in (0, 2)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_ranks_are_the_batch_of_one_process(array: ArraySource, world_size: int) -> None:
    whole = epochs(Loader(array, batch_size=8, seed=1), 2)
    ranks = [epochs(Loader(array, batch_size=8, seed=1, rank=r, world_size=world_size), 2) for r in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert all(len(part.index) == 8 // world_size for part in parts)
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)


@pytest.mark.parametrize(("workers", "stop"), [(0, 0), (0, 1), (0, 3), (0, 4), (0, 5), (0, 7), (0, 8), (2, 3), (2, 4)])
def test_a_restart_anywhere_continues_exactly(files: FileSource, workers: int, stop: int) -> None:
    """4 batches an epoch; stopped after `stop` batches, also at an epoch's last one before its iterator has ended."""
    uninterrupted = epochs(Loader(files, batch_size=5, seed=1, start=crops), 3)
    loader = Loader(files, batch_size=5, seed=1, workers=workers, start=crops)
    seen: list[Loaded] = []
    while len(seen) < stop:
        for batch in loader:
            seen.append(batch)
            if len(seen) == stop:
                break
    state = loader.state_dict()
    assert state == {"epoch": stop // 4, "batches": stop % 4}
    resumed = Loader(files, batch_size=5, seed=1, workers=workers, start=crops)
    iterator = iter(resumed)  # made before the position is known, as Lightning does
    resumed.load_state_dict(state)
    rest = list(iterator)
    while len(seen) + len(rest) < 12:
        rest += list(resumed)
    assert same(seen + rest, uninterrupted)
    assert resumed.state_dict() == {"epoch": 3, "batches": 0}


def test_set_epoch_keeps_a_position_inside_its_epoch_only(array: ArraySource) -> None:
    loader = Loader(array, batch_size=4, seed=0)
    loader.load_state_dict({"epoch": 2, "batches": 3})
    loader.set_epoch(2)
    assert [batch.epoch for batch in loader] == [2, 2]
    loader.load_state_dict({"epoch": 2, "batches": 3})
    loader.set_epoch(7)
    assert [batch.epoch for batch in loader] == [7] * 5


def test_an_iteration_given_up_starts_its_epoch_again(array: ArraySource) -> None:
    loader = Loader(array, batch_size=4, seed=0)
    first = next(iter(loader))
    assert torch.equal(next(iter(loader)).index, first.index)


def test_the_global_random_state_is_left_alone(files: FileSource) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(Loader(files, batch_size=11, seed=1, workers=workers, start=crops))
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_that_do_not_fit_are_refused(array: ArraySource) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=22 or less"):
        Loader(array, batch_size=23, seed=0)
    with pytest.raises(UserError, match="multiple of the 3 devices"):
        Loader(array, batch_size=4, seed=0, world_size=3)
    with pytest.raises(UserError, match=r"same data and data\.batch_size"):
        Loader(array, batch_size=4, seed=0).load_state_dict({"epoch": 0, "batches": 5})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_lost_while_training_is_replaced_by_the_next(files: FileSource, tmp_path: Path, workers: int) -> None:
    for name in files.paths or ():
        (tmp_path / name).write_bytes((Path(files.root) / name).read_bytes())
    source = FileSource(tmp_path, list(files.paths or ()), None, name="own/pretrain")
    intact = epochs(Loader(source, batch_size=5, seed=1, start=crops), 2)
    (tmp_path / "21.png").write_bytes(b"")
    loader = Loader(source, batch_size=5, seed=1, workers=workers, start=crops)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = epochs(loader, 2)
    assert [str(w.message) for w in caught if "21.png" in str(w.message)] == [
        f"{tmp_path / '21.png'} cannot be read (the file is empty); the next image takes its place"
    ]
    lost = 0
    for batch, before in zip(batches, intact, strict=True):
        lost += int((before.index == 21).sum())
        assert torch.equal(batch.index, torch.where(before.index == 21, 0, before.index))
        for row, index in enumerate(batch.index.tolist()):
            expected = crops(source.read(index), index, batch.epoch)
            assert torch.equal(images_of(batch)["global/0"][row], expected["global/0"])
    assert lost
    with pytest.raises(RunError, match=r"21\.png: the file is empty: it was readable before"):
        list(plain_batches(source, batch_size=4, size=8, workers=workers))


def dies(image: Tensor, index: int, epoch: int) -> dict[str, Tensor]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def breaks(image: Tensor, index: int, epoch: int) -> dict[str, Tensor]:
    raise UserError("views.size is too large")


def test_failures_of_workers_are_said_plainly(files: FileSource) -> None:
    with pytest.raises(RunError, match=r"smaller data\.workers"):
        list(Loader(files, batch_size=5, seed=1, workers=1, start=dies))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^views\.size is too large$"):
            list(Loader(files, batch_size=5, seed=1, workers=workers, start=breaks))


def test_files_of_many_sizes_need_crops(files: FileSource) -> None:
    with pytest.raises(ValueError, match="needs `start`"):
        list(Loader(files, batch_size=5, seed=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_batches_are_the_whole_source_in_order(files: FileSource, workers: int) -> None:
    batches = list(plain_batches(files, batch_size=8, size=9, workers=workers))
    assert [len(index) for index, _ in batches] == [8, 8, 6]
    assert torch.cat([index for index, _ in batches]).tolist() == list(range(22))
    images = torch.cat([images for _, images in batches])
    assert images.dtype == torch.uint8
    assert torch.equal(images, torch.stack([plain(files.read(i), 9) for i in range(22)]))


def test_plain_batches_of_arrays(array: ArraySource) -> None:
    whole = torch.cat([images for _, images in plain_batches(array, batch_size=5, size=4)])
    assert torch.equal(whole, array.images)
    ((index, larger),) = plain_batches(array, batch_size=50, size=8)
    assert larger.shape == (22, 3, 8, 8)
    assert (larger[:, 0, 0, 0] == index).all()
    empty = ArraySource(torch.empty(0, 3, 4, 4, dtype=torch.uint8), None, name="none")
    assert list(plain_batches(empty, batch_size=5, size=4)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_array_on_a_device_gives_batches_there(array: ArraySource) -> None:
    here, there = (list(Loader(source, batch_size=4, seed=0)) for source in (array, array.to("cuda")))
    for a, b in zip(here, there, strict=True):
        assert isinstance(a.images, Tensor)
        assert isinstance(b.images, Tensor)
        assert b.images.is_cuda
        assert not b.index.is_cuda
        assert torch.equal(a.images, b.images.cpu())
