"""Data sets in their official layouts, wrong folders, unreadable files, and what `store` decides."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision import datasets as torchvision_datasets

from data.image_files import write_mixed
from mvmr.data import files
from mvmr.data.datasets import DATASETS, SUPERCLASSES
from mvmr.data.files import check_files, scan_tree, write_unreadable
from mvmr.data.images import ArraySource, FileSource, PathList, subset
from mvmr.data.layouts import held_out
from mvmr.data.sources import DataConfig, open_source
from mvmr.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def image(path: Path, colour: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)
    return path


def colours(source: FileSource | ArraySource) -> list[int]:
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


# --- settings -------------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match="did you mean cifar10"):
        DataConfig(name="cifar-10")
    with pytest.raises(ValidationError, match="above 0"):
        DataConfig(std=(0.2, 0.0, 0.2))


def test_every_data_set_has_constants_and_a_drawing() -> None:
    for name, entry in DATASETS.items():
        assert len(entry.mean) == len(entry.std) == 3
        assert entry.layout or name == "digits"


# --- digits ---------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    train, test = (open_source(DataConfig(), split, size=16) for split in ("train", "test"))
    assert (len(train), len(test)) == (1297, 500)
    assert isinstance(train, ArraySource)
    assert train.images.shape == (1297, 3, 8, 8)
    assert (train.images[:, 0] == train.images[:, 2]).all()
    assert train.labels is not None
    assert test.labels is not None
    assert torch.bincount(test.labels).tolist() == pytest.approx([50] * 10, abs=2)
    pixels = torch.cat([train.images, test.images]) / 255
    assert pixels.mean().item() == pytest.approx(DATASETS["digits"].mean[0], abs=2e-3)
    assert pixels.std().item() == pytest.approx(DATASETS["digits"].std[0], abs=2e-3)
    both = {source.read(i).numpy().tobytes() for source in (train, test) for i in range(len(source))}
    assert len(both) > 1790  # the splits share no image (a few scans are alike)
    assert open_source(DataConfig(), "pretrain", size=16).fingerprint == train.fingerprint != test.fingerprint


def test_the_limit_is_seeded_and_spares_the_test_split() -> None:
    config = DataConfig(limit=100)
    one, same, other = (open_source(config, "pretrain", size=16, seed=seed) for seed in (1, 1, 2))
    assert len(one) == 100
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len(open_source(config, "test", size=16)) == 500
    assert len(open_source(DataConfig(limit=5000), "train", size=16)) == 1297


def test_held_out_is_stratified_and_exact() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)
    mask = held_out(labels, 20)
    assert torch.bincount(labels[mask]).tolist() == [10, 6, 4]
    assert (mask == held_out(labels, 20)).all()


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def fake_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, *, kind: str) -> np.ndarray:
    """Files of the official layout with 20 images each, whose MD5 torchvision is told to be the right one."""
    official = torchvision_datasets.CIFAR10 if kind == "10" else torchvision_datasets.CIFAR100
    key, names = ("labels", "label_names") if kind == "10" else ("fine_labels", "fine_label_names")
    classes = 10 if kind == "10" else 100
    fine = sorted(name for members in SUPERCLASSES.values() for name in members.split())
    base = folder / official.base_folder
    base.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)

    def write(name: str, content: dict) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def listed(parts: list) -> list:
        return [[n, write(n, {"data": data, key: [i % classes for i in range(20)]})] for n, _ in parts]

    monkeypatch.setattr(official, "train_list", listed(official.train_list))
    monkeypatch.setattr(official, "test_list", listed(official.test_list))
    meta = write(official.meta["filename"], {names: fine if kind == "100" else [f"c{i}" for i in range(10)]})
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": meta})
    return data


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    data = fake_cifar(tmp_path / "data", monkeypatch, kind="10")
    config = DataConfig(name="cifar10", root=tmp_path / "data" / below)
    train, test = (open_source(config, split, size=32) for split in ("train", "test"))
    assert (len(train), len(test)) == (100, 20)
    assert (test.read(3).numpy() == data[3].reshape(3, 32, 32)).all()  # the files are planar: channel, row, column
    assert test.labels is not None
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    assert test.classes == tuple(f"c{i}" for i in range(10))


def test_a_foreign_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar(tmp_path, monkeypatch, kind="10")

    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="MD5"):
        open_source(DataConfig(name="cifar10", root=tmp_path), "train", size=32)
    assert not (tmp_path / "sprung").exists()


def test_cifar20_from_the_official_cifar100_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar(tmp_path, monkeypatch, kind="100")
    fine = open_source(DataConfig(name="cifar100", root=tmp_path), "test", size=32)
    coarse = open_source(DataConfig(name="cifar20", root=tmp_path), "test", size=32)
    assert fine.labels is not None
    assert coarse.labels is not None
    # Numbers as in the official files: apple 4, aquarium_fish 1, baby 14, bear 8, beaver 0, bed 6, bee 7, beetle 7.
    assert fine.classes[:8] == ("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle")
    assert coarse.labels[:8].tolist() == [4, 1, 14, 8, 0, 6, 7, 7]
    assert sum(len(members.split()) for members in SUPERCLASSES.values()) == 100


@pytest.mark.parametrize("below", ["", "cifar20"])
def test_cifar_as_class_folders(tmp_path: Path, below: str) -> None:
    for split, colour in (("train", 10), ("test", 200)):
        for name in SUPERCLASSES:
            image(tmp_path / "cifar20" / split / name / "a.png", colour, (32, 32))
    config = DataConfig(name="cifar20", root=tmp_path / below)
    test = open_source(config, "test", size=32)
    assert isinstance(test, ArraySource)  # files of one small size are held in memory
    assert test.images.shape == (20, 3, 32, 32)
    assert colours(test) == [200] * 20
    assert test.classes == tuple(SUPERCLASSES)
    with pytest.raises(UserError, match="cifar100 has 100 classes"):
        open_source(DataConfig(name="cifar100", root=tmp_path / "cifar20"), "train", size=32)


# --- STL-10, ImageNet, Tiny ImageNet --------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "stl10_binary"])
def test_stl10_is_column_major(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), dtype=np.uint8)
    columns = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
    columns[:4].tofile(folder / "train_X.bin")
    columns[4:].tofile(folder / "unlabeled_X.bin")
    columns[:2].tofile(folder / "test_X.bin")
    np.array([1, 10, 3, 3], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([2, 9], dtype=np.uint8).tofile(folder / "test_y.bin")
    config = DataConfig(name="stl10", root=tmp_path / below)
    pretrain, train, test = (open_source(config, split, size=96) for split in ("pretrain", "train", "test"))
    assert isinstance(pretrain, ArraySource)
    assert (pretrain.images.numpy() == data).all()
    assert pretrain.labels is None
    assert train.labels is not None
    assert train.labels.tolist() == [0, 9, 2, 2]
    assert test.labels is not None
    assert test.labels.tolist() == [1, 8]
    (folder / "test_y.bin").write_bytes(b"\x0b\x01")
    with pytest.raises(UserError, match=r"test_y\.bin does not hold 2 labels"):
        open_source(config, "test", size=96)
    (folder / "test_X.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="cut short"):
        open_source(config, "test", size=96)


def imagenet(root: Path, classes: int) -> list[str]:
    names = [f"n{number:08d}" for number in range(classes)]
    for number, name in enumerate(names):
        image(root / "train" / name / f"{name}_1.JPEG", number, (8, 9))
        image(root / "val" / name / "ILSVRC2012_val_1.JPEG", number, (8, 9))
    return names


def test_imagenet_and_its_class_lists(tmp_path: Path) -> None:
    names = imagenet(tmp_path / "imagenet", 53)
    full = open_source(DataConfig(name="imagenet", root=tmp_path), "train", size=8)
    assert isinstance(full, FileSource)
    assert full.classes == tuple(names)
    listed = tmp_path / "fifty.txt"
    listed.write_text("# my list\n" + "".join(f"{name} a fish\n" for name in reversed(names[3:])))
    config = DataConfig(name="imagenet50", root=tmp_path, class_list=listed)
    part = open_source(config, "test", size=8)
    assert part.classes == tuple(names[3:])
    assert part.labels is not None
    assert part.labels.tolist() == list(range(50))
    assert part.paths is not None
    assert part.paths[0] == "n00000003/ILSVRC2012_val_1.JPEG"
    with pytest.raises(UserError, match=r"data\.class_list is not set"):
        open_source(DataConfig(name="imagenet50", root=tmp_path), "test", size=8)
    listed.write_text("\n".join(names[:49]))
    with pytest.raises(UserError, match="has 49 class ids"):
        open_source(config, "test", size=8)
    listed.write_text("\n".join([*names[:49], "n99999999"]))
    with pytest.raises(UserError, match="no folder for n99999999"):
        open_source(config, "test", size=8)


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(("n01", "n02")):
        image(root / "train" / name / "images" / f"{name}_0.JPEG", number * 100, (64, 64))
    image(root / "val" / "images" / "val_0.JPEG", 100, (64, 64))
    image(root / "val" / "images" / "val_1.JPEG", 0, (64, 64))
    listed = root / "val" / "val_annotations.txt"
    listed.write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    for given in (tmp_path, root):
        config = DataConfig(name="tiny-imagenet", root=given)
        train, test = (open_source(config, split, size=64) for split in ("train", "test"))
        assert train.labels is not None
        assert train.labels.tolist() == [0, 1]
        assert test.labels is not None
        assert test.labels.tolist() == [1, 0]
        assert test.classes == ("n01", "n02")
    listed.write_text("val_0.JPEG\tn02\n")
    with pytest.raises(UserError, match="do not fit together"):
        open_source(config, "test", size=64)


# --- one's own folders ----------------------------------------------------------------------------------------------


def test_folder_without_splits_holds_out_a_fifth(tmp_path: Path) -> None:
    for number in range(20):
        image(tmp_path / "own" / ("cat" if number < 15 else "dog") / f"{number:02d}.png", number, (8, 10))
    config = DataConfig(name="folder", root=tmp_path / "own")
    everything, train, test = (open_source(config, split, size=8) for split in ("pretrain", "train", "test"))
    assert len(everything) == 20
    assert sorted([*(train.paths or ()), *(test.paths or ())]) == list(everything.paths or ())
    assert test.labels is not None
    assert torch.bincount(test.labels).tolist() == [3, 1]
    assert test.classes == ("cat", "dog")


@pytest.mark.parametrize("held", ["test", "val"])
def test_folder_with_splits(tmp_path: Path, held: str) -> None:
    image(tmp_path / "train" / "a" / "deep" / "1.png", 1, (8, 9))
    image(tmp_path / "train" / "b" / "2.png", 2, (8, 9))
    image(tmp_path / held / "b" / "3.png", 3, (8, 9))
    config = DataConfig(name="folder", root=tmp_path)
    train, test = (open_source(config, split, size=8) for split in ("train", "test"))
    assert (colours(train), colours(test)) == ([1, 2], [3])  # type: ignore[arg-type]
    assert test.labels is not None
    assert test.labels.tolist() == [1]
    image(tmp_path / held / "c" / "4.png", 4)
    with pytest.raises(UserError, match=r"has classes that .* has not: c"):
        open_source(config, "test", size=8)


def test_any_tree_of_images(tmp_path: Path) -> None:
    root = tmp_path / "own"
    image(root / "a.png", 1, (8, 9))
    image(root / "x" / "y" / "b.jpg", 2, (9, 8))
    image(root / ".hidden" / "c.png", 3)
    image(root / "x" / "._d.png", 4)
    (root / "x" / "notes.txt").write_text("no image")
    (root / "x" / "loop").symlink_to(root)
    (root / "linked").symlink_to(image(tmp_path / "elsewhere" / "e.png", 5).parent)
    source = open_source(DataConfig(name="images", root=root), "pretrain", size=8)
    assert list(source.paths or ()) == ["a.png", "linked/e.png", "x/y/b.jpg"]
    assert source.labels is None
    with pytest.raises(UserError, match="no labels"):
        open_source(DataConfig(name="images", root=root), "test", size=8)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_a_wrong_path_is_explained(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set"):
        open_source(DataConfig(name=name), "pretrain", size=8)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "diary.txt").write_text("")
    for root, found in (("holiday", r"diary\.txt"), ("missing", r"no .*missing; .* holds .*holiday/")):
        with pytest.raises(UserError, match=f"(?s)ROOT.*Set data.root.*Found: .*{found}"):
            open_source(DataConfig(name=name, root=tmp_path / root), "pretrain", size=8)
    fetchable = name.startswith(("cifar", "stl10"))
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(name=name, root=tmp_path / "missing"), "pretrain", size=8)
    assert ("data.download=true" in str(caught.value)) == fetchable


# --- unreadable files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_bad_files_are_left_out_and_listed(tmp_path: Path, workers: int) -> None:
    good, bad = write_mixed(tmp_path / "mixed", 90)
    config = DataConfig(name="images", root=tmp_path / "mixed", workers=workers)
    with pytest.raises(UserError, match=r"(?s)data\.max_unreadable: 12 of the 90 .*13\.33 %.*max_unreadable=0\.134"):
        open_source(config, "pretrain", size=16)
    source = open_source(config.model_copy(update={"max_unreadable": 0.134}), "pretrain", size=16)
    assert isinstance(source, FileSource)
    assert sorted(source.locate(i) for i in range(len(source))) == [str(path) for path in good]
    assert sorted(entry.path for entry in source.unreadable) == [str(path) for path in bad]
    write_unreadable(tmp_path / "unreadable.txt", source.unreadable)
    lines = [line.split("\t") for line in (tmp_path / "unreadable.txt").read_text().splitlines()]
    assert sorted(line[0] for line in lines) == [str(path) for path in bad]
    assert all(line[1] for line in lines)


def test_a_folder_of_broken_files_never_trains(tmp_path: Path) -> None:
    image(tmp_path / "own" / "a.png", 1).write_text("broken")
    with pytest.raises(UserError, match="none can be read"):
        open_source(DataConfig(name="images", root=tmp_path / "own", max_unreadable=1.0), "pretrain", size=8)


def test_checks_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        image(tmp_path / "own" / f"{number}.png", number, (8, 8 + number))
    broken = tmp_path / "own" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    reads: list[str] = []
    decode = FileSource.read

    def counted(self: FileSource, index: int) -> torch.Tensor:
        reads.append(self.locate(index))
        return decode(self, index)

    monkeypatch.setattr(FileSource, "read", counted)

    def check() -> list[str]:
        reads.clear()
        scan = scan_tree(tmp_path / "own")
        source = FileSource(scan.root, scan.paths, None, name="own", fingerprint=scan.fingerprint)
        return [entry.path for entry in check_files(source)]

    assert (check(), len(reads)) == ([str(broken)], 5)
    assert (check(), len(reads)) == ([str(broken)], 1)  # only the bad file is tried again
    broken.write_bytes(whole)
    assert (check(), len(reads)) == ([], 5)


def test_large_trees_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "TRUSTED_FROM", 2)
    image(tmp_path / "own" / "x" / "a.png", 1)
    image(tmp_path / "own" / "b.png", 2)
    before = scan_tree(tmp_path / "own")
    walk = files._walk
    monkeypatch.setattr(files, "_walk", lambda *_: pytest.fail("listed again"))
    kept = scan_tree(tmp_path / "own")
    assert list(kept.paths) == list(before.paths) == ["b.png", "x/a.png"]
    assert kept.fingerprint == before.fingerprint
    assert isinstance(kept.paths.letters, np.memmap)
    monkeypatch.setattr(files, "_walk", walk)
    image(tmp_path / "own" / "x" / "c.png", 3)
    assert list(scan_tree(tmp_path / "own").paths) == ["b.png", "x/a.png", "x/c.png"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    image(tmp_path / "own" / "a.png", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache"):
        open_source(DataConfig(name="images", root=tmp_path / "own", cache=tmp_path / "file"), "pretrain", size=8)


# --- kinds of sources -----------------------------------------------------------------------------------------------


def test_path_lists_are_sequences_of_any_names() -> None:
    names = ["a/b.png", "", "ä ö/ü.jpg", os.fsdecode(b"\xff.png"), "z"]
    paths = PathList.of(names)
    assert list(paths) == names
    assert paths[-1] == "z"
    assert list(paths[1:3]) == names[1:3]
    assert list(paths.take(np.array([4, 0, 0]))) == ["z", "a/b.png", "a/b.png"]
    with pytest.raises(IndexError):
        paths[5]


def test_subsets_are_of_the_same_kind_and_have_their_own_fingerprint(tmp_path: Path) -> None:
    for number in range(4):
        image(tmp_path / f"{number}.png", number)
    in_files = FileSource(tmp_path, [f"{n}.png" for n in range(4)], torch.arange(4), name="own", classes=tuple("abcd"))
    in_memory = ArraySource(
        torch.stack([in_files.read(i) for i in range(4)]), torch.arange(4), name="own", paths=["0", "1", "2", "3"]
    )
    for source in (in_files, in_memory):
        part = subset(source, torch.tensor([3, 1]))
        assert type(part) is type(source)
        assert colours(part) == [3, 1]  # type: ignore[arg-type]
        assert part.labels is not None
        assert part.labels.tolist() == [3, 1]
        assert part.paths is not None
        assert "3" in part.paths[0]
        assert len({source.fingerprint, part.fingerprint, subset(source, torch.tensor([1, 3])).fingerprint}) == 3
        assert subset(source, torch.tensor([3, 1])).fingerprint == part.fingerprint
        assert len(pickle.dumps(source)) < 5000


def test_store_decides_how_files_are_held(tmp_path: Path) -> None:
    for number in range(6):
        image(tmp_path / "same" / f"{number}.png", number, (12, 12))
        image(tmp_path / "mixed" / f"{number}.png", number, (12 + number, 14))

    def opened(tree: str, **settings: object) -> FileSource | ArraySource:
        config = DataConfig(name="images", root=tmp_path / tree, **settings)  # type: ignore[arg-type]
        source = open_source(config, "pretrain", size=7)
        assert isinstance(source, FileSource | ArraySource)
        assert colours(source) == list(range(6))
        return source

    same = opened("same")
    assert isinstance(same, ArraySource)
    assert same.images.shape == (6, 3, 12, 12)
    assert not same.is_mapped
    for _ in range(2):  # also when the check is there already
        assert isinstance(opened("mixed"), FileSource)
    assert isinstance(opened("same", store="files"), FileSource)
    array = opened("mixed", store="array")
    assert isinstance(array, ArraySource)
    assert array.is_mapped
    assert array.images.shape == (6, 3, 8, 8)  # 7 x 256 / 224
    memory = opened("mixed", store="memory", store_size=10)
    assert isinstance(memory, ArraySource)
    assert not memory.is_mapped
    assert memory.images.shape == (6, 3, 10, 10)
    with pytest.raises(UserError, match=r"data\.store=files"):
        open_source(DataConfig(store="files"), "train", size=8)
    digits = open_source(DataConfig(store="array"), "train", size=16)
    assert isinstance(digits, ArraySource)
    assert digits.is_mapped
    assert digits.images.shape[-1] == 8
