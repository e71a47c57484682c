"""Splits of COCO do not overlap, depend on the seed alone, and are files of instances again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvmr.data.coco import read_instances
from mvmr.data.coco_splits import split_ids, write_splits
from mvmr.errors import RunError
from mvmr.types import UserError
from scene_files import write_coco


def test_splits_are_disjoint_seeded_and_nested() -> None:
    ids = [7 * n + 3 for n in range(500)]
    small = split_ids(ids, size=20, count=5, seed=1)
    large = split_ids(ids, size=100, count=5, seed=1)
    for splits, size in ((small, 20), (large, 100)):
        assert [len(split) for split in splits] == [size] * 5
        assert len(set().union(*splits)) == 5 * size
        assert all(split == sorted(split) for split in splits)
        assert set().union(*splits) <= set(ids)
    assert set().union(*small) == set(large[0])
    assert split_ids(ids[::-1], size=20, count=5, seed=1) == small
    assert split_ids(ids, size=20, count=5, seed=2) != small
    assert split_ids(ids, size=20, count=3, seed=1) == small[:3]
    *own, rest = split_ids(ids, size=20, count=5, seed=1, rest=True)
    assert own == small
    assert sorted([*rest, *set().union(*small)]) == ids
    # Spread over all: the mean of 100 drawn of 500 is within 5 deviations of the mean of all.
    assert abs(sum(large[0]) / 100 - sum(ids) / 500) < 5 * 7 * 500 / 12**0.5 / 10


@pytest.mark.parametrize(
    ("size", "count", "message"),
    [(100, 6, "600 images are wanted and 500 are there"), (0, 2, "1 or more"), (2, 0, "1 or more")],
)
def test_too_few_images(size: int, count: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--size {size} --count {count}: .*{message}"):
        split_ids(range(500), size=size, count=count)


def test_files_are_instances_again(tmp_path: Path) -> None:
    root = write_coco(tmp_path, train=7)
    file = root / "annotations" / "instances_train2017.json"
    files = write_splits(file, size=2, count=3, seed=4, rest=True)
    assert [made.name for made in files] == [
        *(f"instances_train2017-2-seed4-{number}of3.json" for number in (1, 2, 3)),
        "instances_train2017-2-seed4-rest.json",
    ]
    assert {made.parent for made in files} == {file.parent}
    whole = read_instances(file)
    seen: list[int] = []
    for made in files:
        part = read_instances(made)
        assert part.classes == whole.classes
        for image in part.images:
            assert image in whole.images
            assert part.annotations.get(image["id"], []) == whole.annotations.get(image["id"], [])
            seen.append(image["id"])
        assert set(part.annotations) <= {image["id"] for image in part.images}
        assert json.loads(made.read_text())["info"] == {}
    assert sorted(seen) == [image["id"] for image in whole.images]
    assert not list(root.rglob("*.part"))
    again = write_splits(file, size=2, count=3, seed=4, out=tmp_path / "other")
    assert [made.read_text() for made in again] == [made.read_text() for made in files[:3]]


def test_mistakes(tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    with pytest.raises(UserError, match="--rest: no image"):
        write_splits(file, size=3, count=2, rest=True)
    with pytest.raises(UserError, match=r"gone\.json cannot be read"):
        write_splits(tmp_path / "gone.json", size=1, count=1)
    with pytest.raises(RunError, match=r"cannot be written.*--out"):
        write_splits(file, size=1, count=1, out=file)
