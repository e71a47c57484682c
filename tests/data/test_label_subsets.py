"""Few labels: in proportion, without repetition, the same under one seed, and never from the test split."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvmr.data.images import ArraySource, FileSource, ImageSource, Unreadable, subset
from mvmr.data.label_subsets import listed, per_class, stratified
from mvmr.data.sources import DataConfig, open_source
from mvmr.errors import UserError


def labels_of(*sizes: int) -> Tensor:
    """Labels with so many images of each class, mixed."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def digits(split: str) -> ImageSource:
    return open_source(DataConfig(name="digits"), split, size=8)


def hashes(source: ImageSource) -> set[str]:
    return {hashlib.sha256(source.read(i).numpy().tobytes()).hexdigest() for i in range(len(source))}


def test_a_fraction_keeps_the_proportions_of_the_classes() -> None:
    labels = digits("train").labels
    chosen = stratified(labels, 0.1, seed=0)
    assert len(chosen) == 130  # of 1297
    assert torch.equal(chosen, chosen.unique())  # sorted, none twice
    assert (torch.bincount(labels[chosen]) - 0.1 * torch.bincount(labels)).abs().max() < 1


def test_a_fraction_is_a_function_of_its_seed() -> None:
    labels = digits("train").labels
    chosen = stratified(labels, 0.1, seed=0)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(stratified(labels, 0.1, seed=0), chosen)
    torch.set_rng_state(state)
    others = [stratified(labels, 0.1, seed=seed) for seed in (1, 2, 3)]
    for other in others:
        shared = len(set(chosen.tolist()) & set(other.tolist()))
        assert shared < 0.3 * len(chosen)  # 10 % is expected
    assert stratified(labels, 1.0, seed=4).tolist() == list(range(len(labels)))


def test_the_images_of_a_class_are_drawn_evenly() -> None:
    labels = labels_of(10, 30)
    times = torch.zeros(40)
    for seed in range(400):
        times[stratified(labels, 0.3, seed=seed)] += 1
    assert (times.sum() == 400 * 12).item()
    assert times.min() > 80  # 120 expected, of deviation 9
    assert times.max() < 160


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.integers(0, 2**40),
)
def test_fractions_are_nested_and_divided_by_sainte_lague(sizes: list[int], a: int, b: int, seed: int) -> None:
    labels = labels_of(*sizes)
    small, large = (stratified(labels, part / 1000, seed=seed) for part in sorted((a, b)))
    assert set(small.tolist()) <= set(large.tolist())
    counts = torch.bincount(labels[small], minlength=len(sizes)).tolist()
    assert min(counts) >= 1
    assert sum(counts) == max((2 * min(a, b) * len(labels) + 1000) // 2000, len(sizes))  # rounded half up
    # No image given to a class had a lower claim than one refused to another: what defines the method.
    given_ = [(count - 0.5) / size for count, size in zip(counts, sizes, strict=True) if count > 1]
    refused = [(count + 0.5) / size for count, size in zip(counts, sizes, strict=True) if count < size]
    assert max(given_, default=0) <= min(refused, default=1) + 1e-12


def test_a_fraction_is_read_as_it_is_written() -> None:
    assert 0.29 * 50 < 14.5  # in binary
    assert len(stratified(labels_of(25, 25), 0.29, seed=0)) == 15


def test_so_many_of_each_class() -> None:
    labels = labels_of(50, 20, 9)
    five = per_class(labels, 5, seed=3)
    assert torch.bincount(labels[five]).tolist() == [5, 5, 5]
    assert torch.equal(five, five.unique())
    assert set(five.tolist()) < set(per_class(labels, 9, seed=3).tolist())
    assert five.tolist() != per_class(labels, 5, seed=4).tolist()
    with pytest.raises(UserError, match="labels_per_class=10, but class 2 has 9 training images"):
        per_class(labels, 10, seed=3)
    with pytest.raises(UserError, match="class cat has 0 training images"):
        per_class(labels, 5, seed=3, classes=("a", "b", "c", "cat"))
    even = labels_of(40, 40, 40)
    assert torch.equal(per_class(even, 4, seed=1), stratified(even, 0.1, seed=1))


def test_labels_that_cannot_be_divided() -> None:
    for fraction in (0.0, 1.5, -0.1):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            stratified(labels_of(3, 3), fraction, seed=0)
    with pytest.raises(UserError, match="without label"):
        stratified(torch.tensor([0, 1, -1]), 0.5, seed=0)
    with pytest.raises(UserError, match=r"labels are \[4, 2\]"):
        per_class(torch.zeros(4, 2, dtype=torch.int64), 1, seed=0)


def test_a_subset_shares_no_image_with_the_test_split() -> None:
    train, test = digits("train"), digits("test")
    chosen = subset(train, stratified(train.labels, 0.1, seed=0))
    assert len(hashes(chosen)) == 130
    assert hashes(chosen) & hashes(test) == set()
    assert hashes(chosen) <= hashes(train)


# lists


def files(root: Path) -> FileSource:
    paths = ["n01/n01_7.JPEG", "n01/n01_8.JPEG", "n02/n02_7.JPEG", "n02/x.JPEG", "n01/x.JPEG"]
    return FileSource(root, paths, torch.tensor([0, 0, 1, 1, 0]), name="imagenet/train", fingerprint="f")


def arrays() -> ArraySource:
    return ArraySource(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), torch.arange(6), name="digits/train")


def test_a_list_of_names_paths_or_positions(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("# SimCLR's lists name files alone\nn02_7.JPEG\n\n  n01_7.JPEG \r\n")
    assert listed(files(tmp_path), file).tolist() == [0, 2]
    file.write_text("train/n02/x.JPEG\n./n01/n01_8.JPEG\nn01/x.JPEG\n/data/train/n02/n02_7.JPEG\n")
    assert listed(files(tmp_path), file).tolist() == [1, 2, 3, 4]
    file.write_text("# positions\n5\n0\n")
    assert listed(arrays(), file).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "n01_7.JPEG\nn09_1.JPEG\n01/n01_8.JPEG\n",
            r"2 of its 3 lines name no image of imagenet/train: n09_1.JPEG, 01/",
        ),
        ("x.JPEG\n", "1 of its 1 lines fit several images of imagenet/train: x.JPEG; write their folders"),
        ("n01_7.JPEG\nn02_7.JPEG\nn01/n01_7.JPEG\n", "1 images more than once: n01_7.JPEG, n01/n01_7.JPEG;"),
        ("n01_7.JPEG\nn01_7.JPEG\n", "1 images more than once: n01_7.JPEG;"),
        ("# nothing\n\n", "names no image"),
        ("".join(f"{i}.JPEG\n" for i in range(9)), "0.JPEG, 1.JPEG, 2.JPEG, 3.JPEG, 4.JPEG and 4 more"),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "own.txt"
    file.write_text(lines)
    with pytest.raises(UserError, match=message) as caught:
        listed(files(tmp_path), file)
    assert str(file) in str(caught.value)


def test_lists_of_positions_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("1\n6\n-1\n²\nn01_7.JPEG\n")
    with pytest.raises(UserError, match="4 of its 5 lines name no image from 0 to 5: 6, -1, ²"):
        listed(arrays(), file)
    file.write_text("1\n01\n")
    with pytest.raises(UserError, match="1 images more than once: 1, 01"):
        listed(arrays(), file)
    with pytest.raises(UserError, match="cannot be read"):
        listed(arrays(), tmp_path / "none.txt")


def test_a_list_says_that_files_were_left_out(tmp_path: Path) -> None:
    source = files(tmp_path)
    source.unreadable = [Unreadable("n03/a.JPEG", "the file is empty")]
    file = tmp_path / "own.txt"
    file.write_text("a.JPEG\n")
    with pytest.raises(UserError, match="1 files were left out as unreadable"):
        listed(source, file)
