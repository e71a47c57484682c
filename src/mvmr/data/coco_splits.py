"""Random splits of a COCO training set that do not overlap, for transfer with few labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mvmr.data.coco import read_instances
from mvmr.ops.files import write_bytes
from mvmr.ops.random import permutation
from mvmr.types import UserError


def split_ids(ids: Sequence[int], *, size: int, count: int, seed: int = 0, rest: bool = False) -> list[list[int]]:
    """`count` lists of `size` ids each, no id in two, and with `rest` a last list of all others; each sorted.

    A pure function of (seed, the set of ids): ids are shuffled once and cut into runs. So splits of several sizes are
    nested: under one seed, the five of 1,000 lie within the first of 10,000 images. Raises UserError.
    """
    ordered = sorted(set(ids))
    if size < 1 or count < 1:
        raise UserError(f"--size {size} --count {count}: both must be 1 or more")
    if size * count > len(ordered):
        raise UserError(
            f"--size {size} --count {count}: {size * count} images are wanted and {len(ordered)} are there; "
            "take fewer or smaller splits"
        )
    order = [ordered[position] for position in permutation(seed, 0, len(ordered)).tolist()]
    cuts = [sorted(order[part * size : (part + 1) * size]) for part in range(count)]
    return [*cuts, sorted(order[count * size :])] if rest else cuts


def write_splits(
    annotations: Path, *, size: int, count: int, seed: int = 0, out: Path | None = None, rest: bool = False
) -> list[Path]:
    """Write one file of COCO's instances a split, beside `annotations` or into the folder `out`; returns the files.

    NAME-SIZE-seedSEED-1of5.json and so on, and NAME-SIZE-seedSEED-rest.json; images are drawn from all in the file,
    those without objects included; categories are kept whole. Each is written beside and moved into place. Raises
    UserError for what is no such file, and RunError where the disk does not take it.
    """
    annotations = annotations.expanduser()
    found = read_instances(annotations)
    parts = split_ids([image["id"] for image in found.images], size=size, count=count, seed=seed, rest=rest)
    if rest and not parts[-1]:
        raise UserError(f"--rest: no image of {annotations} is left over; take fewer or smaller splits")
    content = json.loads(annotations.read_bytes())
    folder = annotations.parent if out is None else out.expanduser()
    written = []
    for number, part in enumerate(parts, 1):
        which = "rest" if number > count else f"{number}of{count}"
        own = set(part)
        chosen = {
            **content,
            "images": [image for image in content["images"] if image["id"] in own],
            "annotations": [one for one in content["annotations"] if one["image_id"] in own],
        }
        file = folder / f"{annotations.stem}-{size}-seed{seed}-{which}.json"
        write_bytes(file, json.dumps(chosen).encode(), remedy="give another folder with --out")
        written.append(file)
    return written
