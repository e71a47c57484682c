"""PASCAL VOC 2007 in its official layout: labels from the annotations, and what is said where something is wrong."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from data.voc_files import Objects, annotation, objects_by_search, write_voc
from mvmr.data.images import ArraySource, FileSource, subset
from mvmr.data.sources import DataConfig, open_source
from mvmr.data.voc import VOC_CLASSES, read_objects
from mvmr.errors import UserError

TRAINVAL: dict[str, Objects] = {
    "000005": [("chair", 0), ("chair", 1), ("car", 1)],
    "000007": [("car", 1), ("car", 0)],
    "000009": [("horse", 1), ("person", 0), ("person", 0)],
}
TEST: dict[str, Objects] = {"000001": [("dog", 0), ("person", 1)], "000002": [("train", 0)]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))


def labels_of(source: FileSource | ArraySource) -> list[dict[str, int]]:
    assert source.labels is not None
    return [{VOC_CLASSES[i]: row[i] for i in range(20) if row[i]} for row in source.labels.tolist()]


def test_splits_and_labels(tmp_path: Path) -> None:
    base = write_voc(tmp_path, TRAINVAL, TEST, lists=True)
    for root in (tmp_path, base.parent, base):
        config = DataConfig(name="voc07", root=root)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the lists agree
            train, test, pretrain = (open_source(config, split, size=8) for split in ("train", "test", "pretrain"))
        assert isinstance(train, FileSource)
        assert isinstance(test, FileSource)
        assert list(train.paths or ()) == ["000005.jpg", "000007.jpg", "000009.jpg"]
        assert list(test.paths or ()) == ["000001.jpg", "000002.jpg"]
        assert labels_of(train) == [{"chair": 1, "car": -1}, {"car": 1}, {"horse": -1, "person": 1}]
        assert labels_of(test) == [{"dog": 1, "person": -1}, {"train": 1}]
        assert train.labels is not None
        assert (train.labels.dtype, tuple(train.labels.shape)) == (torch.int8, (3, 20))
        assert train.read(0).shape == (3, 16, 25)
        assert train.classes == test.classes == VOC_CLASSES == tuple(sorted(VOC_CLASSES))
        assert (list(pretrain.paths or ()), pretrain.labels) == (list(train.paths or ()), None)


def test_labels_follow_their_images(tmp_path: Path) -> None:
    base = write_voc(tmp_path, TRAINVAL, TEST)
    config = DataConfig(name="voc07", root=tmp_path, max_unreadable=0.5)
    train = open_source(config, "train", size=8)
    assert labels_of(subset(train, torch.tensor([2, 0]))) == [{"horse": -1, "person": 1}, {"chair": 1, "car": -1}]
    array = open_source(config.model_copy(update={"store": "array"}), "train", size=8)
    assert isinstance(array, ArraySource)
    assert labels_of(array) == labels_of(train)
    (base / "JPEGImages/000007.jpg").write_bytes(b"")  # unreadable: left out, and its labels with it
    for store in ("files", "array", "memory"):
        kept = open_source(config.model_copy(update={"store": store}), "train", size=8)
        assert [entry.path for entry in kept.unreadable] == [str(base / "JPEGImages/000007.jpg")]
        assert labels_of(kept) == [{"chair": 1, "car": -1}, {"horse": -1, "person": 1}]


def test_pretraining_needs_no_annotations(tmp_path: Path) -> None:
    base = write_voc(tmp_path, TRAINVAL, TEST)
    for file in (base / "Annotations").iterdir():
        file.unlink()
    assert len(open_source(DataConfig(name="voc07", root=tmp_path), "pretrain", size=8)) == 3


def test_a_list_that_differs_is_named_and_the_annotations_decide(tmp_path: Path) -> None:
    base = write_voc(tmp_path, TRAINVAL, TEST, lists=True)
    (base / "ImageSets/Main/car_trainval.txt").write_text("000005  1\n000007  1\n")
    with pytest.warns(UserWarning, match=r"car_trainval\.txt differs .* 2 of 3 images, 000005 among them"):
        source = open_source(DataConfig(name="voc07", root=tmp_path), "train", size=8)
    assert labels_of(source)[0] == {"chair": 1, "car": -1}


@pytest.mark.parametrize("missing", ["JPEGImages/000007.jpg", "Annotations/000007.xml", "ImageSets/Main/trainval.txt"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    base = write_voc(tmp_path, TRAINVAL, TEST)
    (base / missing).unlink()
    with pytest.raises(UserError, match=f"(?s){missing}.*ROOT/VOCdevkit/VOC2007"):
        open_source(DataConfig(name="voc07", root=tmp_path), "train", size=8)


def test_lists_that_cannot_be(tmp_path: Path) -> None:
    base = write_voc(tmp_path, TRAINVAL, TEST)
    listed = base / "ImageSets/Main/trainval.txt"
    for text, problem in (("\n", "empty"), ("000005\n000005\n", "twice"), ("../outside\n", "outside.jpg is missing")):
        listed.write_text(text)
        with pytest.raises(UserError, match=problem):
            open_source(DataConfig(name="voc07", root=tmp_path), "train", size=8)


ENTITIES = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_document_type_is_refused(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "bomb.xml"
    file.write_bytes(ENTITIES.encode(encoding))
    with pytest.raises(UserError, match=r"bomb\.xml declares a document type"):
        read_objects(file)
    file.write_bytes(annotation([("dog", 1)]).encode(encoding))
    assert read_objects(file) == [(VOC_CLASSES.index("dog"), True)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no XML"),
        ("<annotation><object>", "is no XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "is no XML"),
        (annotation([("unicorn", 0)]), r"object 'unicorn'.*aeroplane"),
        ("<annotation><object><difficult>0</difficult></object></annotation>", "object ''"),
        (annotation([("dog", 2)]), "difficult='2'"),
    ],
)
def test_annotations_that_cannot_be(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "wrong.xml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"wrong\.xml.*{problem}"):
        read_objects(file)


def test_an_object_without_the_flag_is_not_difficult(tmp_path: Path) -> None:
    file = tmp_path / "a.xml"
    file.write_text("<annotation><object><name>\n cow </name></object></annotation>")
    assert read_objects(file) == [(VOC_CLASSES.index("cow"), False)]


def test_a_source_refuses_labels_that_do_not_fit_its_classes() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"C = 3, not \[2, 2\]"):
        ArraySource(images, torch.zeros(2, 2), name="x", classes=("a", "b", "c"))
    source = ArraySource(images, torch.tensor([[1, 0], [-1, 1]]), name="x", classes=("a", "b"))
    assert subset(source, torch.tensor([1])).labels.tolist() == [[-1, 1]]


@pytest.mark.skipif("MVMR_TEST_DATA" not in os.environ, reason="MVMR_TEST_DATA, a folder with VOCdevkit, is not set")
def test_real_annotations_agree_with_a_plain_search() -> None:
    """Each object's name and flag found by text search in the file, not by an XML parser."""
    root = Path(os.environ["MVMR_TEST_DATA"])
    for split in ("train", "test"):
        source = open_source(DataConfig(name="voc07", root=root), split, size=8)
        assert isinstance(source, FileSource)
        for index, found in enumerate(labels_of(source)):
            objects = objects_by_search(source.locate(index))
            assert objects
            shown = {name: 1 for name, difficult in objects if not difficult}
            assert found == {name: -1 for name, _ in objects} | shown, source.locate(index)
