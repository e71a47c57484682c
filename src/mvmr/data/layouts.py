"""Reading data sets that are folders of image files, and saying what is wrong where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mvmr.data.files import Scan, scan_tree
from mvmr.data.images import FileSource, Progress
from mvmr.errors import UserError
from mvmr.ops.random import permutation

Split = Literal["pretrain", "train", "test"]

SPLIT_SEED = 0
"""Seeds held-out splits that a data set does not come with: fixed, so that results of all runs compare."""
HELD_OUT = 0.2
"""Share of the images that is held out of class folders without a split of their own."""
TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Wanted:
    """One split of one data set, as asked for by the settings."""

    name: str
    split: Split
    root: Path | None
    layout: str
    """A drawing of the folders that are expected under ROOT."""
    class_list: Path | None = None
    download: bool = False
    fetchable: bool = False
    """Whether data.download=true can fetch it."""
    cache: Path | None = None
    progress: Progress | None = None

    @property
    def title(self) -> str:
        return f"{self.name}/{self.split}"

    def folder(self) -> Path:
        """data.root; raises UserError where it is not set or no folder."""
        if self.root is None:
            raise UserError(f"data.root is not set. {self.expected()}")
        root = self.root.expanduser()
        if not root.is_dir() and not (self.download and self.fetchable):
            raise self.wrong(root)
        return root

    def either(self, *below: str) -> Path:
        """data.root, or the first of these folders in it that exists: people give the folder or its parent."""
        root = self.folder()
        return next((root / name for name in below if (root / name).is_dir()), root)

    def wrong(self, folder: Path, problem: str = "") -> UserError:
        """The error that says what was expected under data.root and what was found in `folder`."""
        problem = problem or f"{folder} does not hold {self.name}"
        return UserError(f"data.root: {problem}. {self.expected()}\nFound: {_contents(folder)}")

    def expected(self) -> str:
        fetch = ", or let data.download=true fetch it there" if self.fetchable else ""
        drawing = "".join(f"\n  {line}" for line in self.layout.splitlines())
        return f"data.name={self.name} needs data.root=ROOT (or its parent) with{drawing}\nSet data.root to it{fetch}."


def _contents(folder: Path) -> str:
    if not folder.exists():
        return f"no {folder}; {_contents(folder.absolute().parent)}"
    if not folder.is_dir():
        return f"{folder} is a file, not a folder"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty"
    return f"{folder} holds {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def held_out(labels: Tensor, count: int) -> Tensor:
    """Mask [N] of `count` images, spread over the classes in proportion (largest remainders), the same in every run.

    labels: [N], one class an image.
    """
    sizes = torch.bincount(labels)
    exact = sizes.double() * count / len(labels)
    take = exact.floor().long()
    take[torch.argsort(exact - take, descending=True, stable=True)[: count - int(take.sum())]] += 1
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for number, (size, some) in enumerate(zip(sizes.tolist(), take.tolist(), strict=True)):
        mask[(labels == number).nonzero()[permutation(SPLIT_SEED, number, size)[:some], 0]] = True
    return mask


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")))


def class_folders(wanted: Wanted, folder: Path, classes: Sequence[str] | None = None) -> FileSource:
    """Images of folder/CLASS/**; `classes` (default: those there) gives names and numbers, others are left out."""
    if classes is None:
        classes = class_names(folder)
    if not classes or not folder.is_dir():
        raise wanted.wrong(folder)
    scan = scan_tree(folder, cache=wanted.cache, progress=wanted.progress)
    return _labelled(wanted, scan, {name: number for number, name in enumerate(classes)})


def _labelled(wanted: Wanted, scan: Scan, numbers: dict[str, int]) -> FileSource:
    labels = torch.tensor([numbers.get(path.split("/", 1)[0], -1) if "/" in path else -1 for path in scan.paths])
    source = FileSource(
        scan.root, scan.paths, labels, name=wanted.title, classes=tuple(numbers), fingerprint=scan.fingerprint
    )
    inside = (labels >= 0).nonzero()[:, 0] if len(labels) else torch.empty(0, dtype=torch.int64)
    if len(inside) == 0:
        raise wanted.wrong(Path(scan.root), f"no images in the class folders of {scan.root}")
    return source if len(inside) == len(source) else source.take(inside)


def read_images(wanted: Wanted) -> FileSource:
    """Every image file below data.root, without labels."""
    if wanted.split != "pretrain":
        raise UserError(
            f"data.name={wanted.name} has no labels and no {wanted.split} split: evaluate on class folders with "
            "data.name=folder, or on another data set"
        )
    scan = scan_tree(wanted.folder(), cache=wanted.cache, progress=wanted.progress)
    if len(scan.paths) == 0:
        raise wanted.wrong(wanted.folder(), f"no image files below {scan.root}")
    return FileSource(scan.root, scan.paths, None, name=wanted.title, fingerprint=scan.fingerprint)


def read_folder(wanted: Wanted) -> FileSource:
    """Class folders, with split folders or without; see DATASETS["folder"]."""
    root = wanted.folder()
    train = root / "train" if (root / "train").is_dir() else root
    tests = [root / name for name in TEST_FOLDERS if train != root and class_names(root / name)]
    if not class_names(train):
        raise wanted.wrong(train, f"{train} has no class folders (data.name=images reads images without classes)")
    if wanted.split == "test" and tests:
        classes = class_names(train)
        unknown = sorted(set(class_names(tests[0])) - set(classes))
        if unknown:
            raise UserError(f"data.root: {tests[0]} has classes that {train} has not: {', '.join(unknown[:5])}")
        return class_folders(wanted, tests[0], classes)
    source = class_folders(wanted, train)
    if wanted.split == "pretrain" or tests:
        return source
    assert source.labels is not None
    mask = held_out(source.labels, round(HELD_OUT * len(source)))
    return source.take((mask if wanted.split == "test" else ~mask).nonzero()[:, 0])


def read_split_folders(wanted: Wanted, *below: str, classes: int | None = None) -> FileSource:
    """{train,test or val}/CLASS/**, under data.root or one of the folders `below` it, with this many classes."""
    root = wanted.either(*below)
    train = root / "train"
    names = class_names(train)
    if classes is not None and names and len(names) != classes:
        raise wanted.wrong(train, f"{wanted.name} has {classes} classes, {train} has {len(names)} class folders")
    if wanted.split != "test":
        return class_folders(wanted, train)
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), root / TEST_FOLDERS[0])
    if not class_names(test):
        raise wanted.wrong(test, f"{test} has no class folders")
    return class_folders(wanted, test, names or None)


def read_imagenet(wanted: Wanted) -> FileSource:
    """train/ and val/ class folders; with a class list, only the classes on it."""
    root = wanted.either("imagenet", "ILSVRC2012")
    folder = root / ("val" if wanted.split == "test" else "train")
    if not class_names(folder):
        raise wanted.wrong(folder if folder.is_dir() else root, f"{folder} has no class folders")
    if wanted.name == "imagenet":
        return class_folders(wanted, folder)
    classes = _class_list(wanted, int(wanted.name.removeprefix("imagenet")))
    missing = sorted(set(classes) - set(class_names(folder)))
    if missing:
        raise UserError(f"data.class_list: {folder} has no folder for {', '.join(missing[:5])} of {wanted.class_list}")
    return class_folders(wanted, folder, classes)


def _class_list(wanted: Wanted, count: int) -> list[str]:
    if wanted.class_list is None:
        raise UserError(
            f"data.class_list is not set: data.name={wanted.name} needs a text file of its {count} class ids "
            "(n01440764 and so on), one a line"
        )
    try:
        lines = wanted.class_list.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_list: {wanted.class_list} cannot be read ({error})") from None
    classes = sorted({line.split()[0] for line in lines if line.strip() and not line.startswith("#")})
    if len(classes) != count:
        raise UserError(f"data.class_list: {wanted.class_list} has {len(classes)} class ids, {wanted.name} has {count}")
    return classes


def read_tiny_imagenet(wanted: Wanted) -> FileSource:
    """train/WNID/images/*.JPEG, and val/images with val/val_annotations.txt (or val/ sorted into class folders)."""
    root = wanted.either("tiny-imagenet-200", "tiny-imagenet")
    classes = class_names(root / "train")
    if not classes:
        raise wanted.wrong(root)
    if wanted.split != "test":
        return class_folders(wanted, root / "train")
    listed = root / "val" / "val_annotations.txt"
    if not listed.is_file():
        return class_folders(wanted, root / "val", classes)
    rows = [line.split("\t") for line in listed.read_text().splitlines() if line.strip()]
    found = {row[0]: row[1] for row in rows if len(row) > 1 and row[1] in classes}
    scan = scan_tree(root / "val" / "images", cache=wanted.cache, progress=wanted.progress)
    if len(scan.paths) == 0 or any(path not in found for path in scan.paths):
        raise wanted.wrong(root / "val", f"the images in {scan.root} and the lines of {listed} do not fit together")
    labels = torch.tensor([classes.index(found[path]) for path in scan.paths])
    return FileSource(scan.root, scan.paths, labels, name=wanted.title, classes=classes, fingerprint=scan.fingerprint)
