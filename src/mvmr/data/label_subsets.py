"""Which labelled images are trained on where labels are few: by share, by number a class, or from a list."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from mvmr.data.images import ImageSource
from mvmr.errors import UserError
from mvmr.ops.random import permutation

SUBSET_EPOCH = 0xFFFFFFFF
"""The epoch of the shuffle behind subsets: no run reaches it, so orders of training never repeat this one."""
SHOWN = 5
"""Lines of a list that an error names."""


def stratified(labels: Tensor, fraction: float, *, seed: int) -> Tensor:
    """Sorted positions of a share of labels [N] int64 that keeps the classes' proportions, without replacement.

    The total is fraction * N, rounded half up. Every class that occurs gets one image (so that there may be more than
    that total), and the rest goes by the divisor method of Sainte-Laguë: class c has about fraction * N_c, rounded.
    Of largest remainders, which give the same but for rounding, more images may mean fewer of one class; here, for one
    seed, a smaller fraction is always a part of a larger one. A pure function of its arguments; [n] int64 on the CPU.
    Raises UserError for a fraction outside (0, 1] and for labels below 0.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction is {fraction:g}; it must be above 0 and at most 1")
    order, classes, place = _shuffled(labels, seed)
    sizes = torch.bincount(classes)[classes].double()  # [N], of each image's class
    # Sainte-Laguë: the k-th image of a class of n has priority (k - 1/2) / n; ties follow the shuffle.
    priority = torch.where(place == 0, -1.0, (place + 0.5) / sizes)  # [N]
    # In decimals, as it was written: 0.29 * 50 is 14.5, and in binary a little less.
    total = math.floor(Fraction(str(fraction)) * len(labels) + Fraction(1, 2))
    total = max(total, int((place == 0).sum()))
    return order[torch.argsort(priority, stable=True)[:total]].sort().values


def per_class(labels: Tensor, count: int, *, seed: int, classes: Sequence[str] = ()) -> Tensor:
    """Sorted positions of `count` images of every class of labels [N] int64, without replacement.

    For one seed, fewer are a part of more, and of what `stratified` takes where the classes have one size. classes:
    names, each of which must have images. [n] int64 on the CPU. Raises UserError where a class has fewer than `count`.
    """
    order, found, place = _shuffled(labels, seed)
    sizes = torch.bincount(found, minlength=len(classes))
    for label in range(len(classes)) if classes else labels.unique().tolist():
        if sizes[label] < count:
            raise UserError(
                f"labels_per_class={count}, but class {classes[label] if classes else label} has {int(sizes[label])} "
                "training images; take fewer labels"
            )
    return order[place < count].sort().values


def _shuffled(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions in the seed's order, and in that order each image's class and how many of it come before."""
    if labels.ndim != 1 or len(labels) == 0:
        raise UserError(f"labels are {list(labels.shape)}; a subset is taken of one label an image, [N] with N above 0")
    if int(labels.min()) < 0:
        raise UserError("there are images without label (below 0); leave them out")
    order = permutation(seed, SUBSET_EPOCH, len(labels))
    classes = labels.cpu()[order]
    grouped = torch.argsort(classes, stable=True)
    sizes = torch.bincount(classes)
    first = sizes.cumsum(0) - sizes  # [C]
    place = torch.empty_like(order)
    place[grouped] = torch.arange(len(order)) - first[classes[grouped]]
    return order, classes, place


def listed(source: ImageSource, file: Path) -> Tensor:
    """Sorted positions of the images that a text file names, one a line; [n] int64.

    A line is a file's name (n01440764_10043.JPEG, as in SimCLR's lists), or a path that ends as the source's path
    does, with more or fewer folders before it. Where images have no paths, lines are positions from 0. Empty lines
    and lines that begin with # are passed over. Raises UserError, with the first of the lines, where one is not found,
    fits several images, or names an image again, and for a file without lines.
    """
    try:
        lines = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a text file of image names, one a line") from None
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"{file}: names no image; give one image name a line")
    if source.paths is None:
        found = {name: _position(name, len(source)) for name in names}
    else:
        found = _places(names, source.paths)
    _refuse_unknown(file, source, found)
    _refuse_repeated(file, names, found)
    return torch.tensor(sorted(places[0] for places in found.values()))


def _position(name: str, count: int) -> list[int]:
    return [int(name)] if name.isascii() and name.isdigit() and int(name) < count else []


def _places(names: Sequence[str], paths: Sequence[str]) -> dict[str, list[int]]:
    """Positions of the paths that each name fits."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        ends[name.rpartition("/")[2]].append(name)
    found: dict[str, list[int]] = {name: [] for name in names}
    for position, path in enumerate(paths):
        for name in ends.get(path.rpartition("/")[2], ()):
            if _ends_with(name.removeprefix("./"), path):
                found[name].append(position)
    return found


def _ends_with(name: str, path: str) -> bool:
    """Whether one of them is the other with folders before it."""
    return f"/{path}".endswith(f"/{name}") or f"/{name}".endswith(f"/{path}")


def _refuse_unknown(file: Path, source: ImageSource, found: Mapping[str, Sequence[int]]) -> None:
    missing = [name for name, places in found.items() if not places]
    if missing:
        kind = f"from 0 to {len(source) - 1}" if source.paths is None else f"of {source.name}"
        left_out = f" ({len(source.unreadable)} files were left out as unreadable)" if source.unreadable else ""
        raise UserError(
            f"{file}: {len(missing)} of its {len(found)} lines name no image {kind}{left_out}: {_shown(missing)}; "
            "take the list and the data set that belong together"
        )
    several = [name for name, places in found.items() if len(places) > 1]
    if several:
        raise UserError(
            f"{file}: {len(several)} of its {len(found)} lines fit several images of {source.name}: {_shown(several)}; "
            "write their folders too"
        )


def _refuse_repeated(file: Path, names: Sequence[str], found: Mapping[str, Sequence[int]]) -> None:
    often = {place for place, times in Counter(found[name][0] for name in names).items() if times > 1}
    if often:
        repeated = list(dict.fromkeys(name for name in names if found[name][0] in often))
        raise UserError(f"{file}: names {len(often)} images more than once: {_shown(repeated)}; leave each in once")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
