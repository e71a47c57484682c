"""The cache of representations: what a look-up gives, what the key depends on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmr.data.images import ArraySource, FileSource, subset
from mvmr.data.view_ops import as_float, normalise
from mvmr.errors import RunError, UserError
from mvmr.ops.projection import Projection
from mvmr.representations import build_representations, cache_store
from mvmr.representations.base import Representation, fixed
from mvmr.representations.cache import CacheConfig, CachedRows, CacheRequest, cache_representations, clear, entries

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
HAND_CRAFTED = {"scattering": {}, "hog": {"cell": 4}, "local_std": {}}


class Teacher(Representation):
    """A small trained net, known by its weights; `factor` scales what it gives."""

    learned = True

    def __init__(self, seed: int = 0, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.register_buffer("weight", torch.randn(40, 3 * 16 * 16, generator=torch.Generator().manual_seed(seed)))
        self.images = 0

    def fingerprint(self) -> str:
        return cache_store.hashlib.sha256(self.weight.numpy().tobytes() + str(self.factor).encode()).hexdigest()

    @fixed
    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        self.images += len(images)
        return images.flatten(1) @ self.weight.T * self.factor


def pictures(images: int = 20, size: int = 16, *, seed: int = 0) -> ArraySource:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    return ArraySource(pixels, None, name="own/train")


def request(folder: Path, **changes: Any) -> CacheRequest:
    settings = {"size": 16, "mean": MEAN, "std": STD, "folder": folder, "device": torch.device("cpu"), **changes}
    return CacheRequest(**settings)


def built(settings: dict[str, dict[str, Any]] = HAND_CRAFTED, **more: Representation) -> nn.ModuleDict:
    representations = build_representations(settings, mean=MEAN, std=STD)
    representations.update(more)
    return representations


def directly(source: ArraySource, representation: Representation) -> Tensor:
    return representation(normalise(as_float(source.images), MEAN, STD))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "ROWS_PER_SHARD", 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2.0**-11)])
def test_lookups_equal_what_is_computed(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    source, representations = pictures(), built(teacher=Teacher())
    told: list[tuple[str, int, int]] = []
    asked = request(tmp_path, batch_size=4, progress=lambda *now: told.append(now))
    kept = cache_representations(source, representations, CacheConfig(width=64, dtype=dtype), request=asked)
    assert list(kept) == ["scattering", "hog", "local_std", "teacher"]
    assert told[0] == ("representations", 4, 20)
    assert told[-1] == ("representations", 20, 20)
    assert [kept[name].width for name in kept] == [64, 64, 64, 40]
    index = torch.tensor([19, 3, 3, 0, 8, 7, 16, 3])
    for name, rows in kept.items():
        # Four images at a time, as they are made, because sums of other batches may round differently.
        parts = [directly(subset(source, part), representations[name]) for part in torch.arange(20).split(4)]
        values = torch.cat(parts)
        expected = values if name == "teacher" else Projection(values.shape[1], 64)(values)
        found = rows(index)
        assert found.dtype == torch.float32
        assert ((found - expected[index]).abs() <= tolerance * expected[index].abs() + tolerance * 1e-4).all()
        assert len(rows) == 20
        assert rows.nbytes == 20 * rows.width * (2 if dtype == "float16" else 4)
        assert torch.equal(rows.rows(index, "cpu"), found)


def test_lookups_of_any_indices(tmp_path: Path) -> None:
    rows = cache_representations(pictures(), built({"hog": {}}), CacheConfig(), request=request(tmp_path))["hog"]
    every = rows(torch.arange(20))
    order = torch.randperm(20)
    assert torch.equal(rows(order), every[order])
    assert torch.equal(rows(torch.tensor([5] * 9)), every[5].expand(9, -1))
    assert rows(torch.empty(0, dtype=torch.int64)).shape == (0, rows.width)
    resident = rows.resident("cpu")
    assert torch.equal(resident(order), every[order])
    assert (len(resident), resident.nbytes, resident.dtype) == (20, rows.nbytes, torch.float16)
    for cached in (rows, resident):
        for wrong in (20, -1):
            with pytest.raises(IndexError, match=f"image {wrong} of a cache of 20"):
                cached(torch.tensor([0, wrong]))


def test_a_lookup_does_not_read_other_rows() -> None:
    shards = [torch.full((8, 4), float(number)) for number in range(1000)]
    rows = CachedRows(shards, 8)
    index = torch.randperm(8000)[:256]
    assert torch.equal(rows(index)[:, 0], (index // 8).float())


def test_what_is_kept(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {"pixels": {}, "augmented_pixels": {}, "hog": {}}
    unknown = build_representations({"local_std": {}})["local_std"]
    unknown.settings = None
    kept = cache_representations(pictures(), built(settings, x=unknown), CacheConfig(), request=request(tmp_path))
    assert list(kept) == ["hog"]
    off = cache_representations(pictures(), built(), CacheConfig(enabled=False), request=request(tmp_path))
    assert off == {}
    assert len(entries(tmp_path)) == 1


def test_exact_and_projected_width(tmp_path: Path) -> None:
    source, representations = pictures(), built({"hog": {}, "local_std": {}}, teacher=Teacher())
    exact = CacheConfig(width=None, dtype="float32")
    kept = cache_representations(source, representations, exact, request=request(tmp_path))
    assert torch.equal(kept["local_std"](torch.arange(20)), directly(source, representations["local_std"]))
    cache_representations(source, representations, CacheConfig(width=32), request=request(tmp_path))
    widths = {(entry.kind, entry.width, entry.projected_from) for entry in entries(tmp_path)}
    assert widths == {
        ("HOG", 288, None), ("LocalStd", 768, None), ("Teacher", 40, None), ("HOG", 32, 288), ("LocalStd", 32, 768),
    }  # fmt: skip


def keys(folder: Path) -> set[str]:
    return {entry.key for entry in entries(folder)}


@pytest.mark.parametrize(
    ("what", "source", "representations", "config", "changes"),
    [
        ("images", lambda: pictures(seed=1), None, {}, {}),
        ("number of images", lambda: subset(pictures(), torch.arange(19)), None, {}, {}),
        ("order of images", lambda: subset(pictures(), torch.arange(19, -1, -1)), None, {}, {}),
        ("settings", None, lambda: built({"hog": {"bins": 9}}, teacher=Teacher()), {}, {}),
        ("weights", None, lambda: built({"hog": {}}, teacher=Teacher(seed=1)), {}, {}),
        ("size", None, lambda: built({"hog": {}}), {}, {"size": 8}),
        ("mean", None, None, {}, {"mean": (0.5, 0.4, 0.31)}),
        ("std", None, None, {}, {"std": (0.25, 0.2, 0.31)}),
        ("type", None, None, {"dtype": "float32"}, {}),
        ("width", None, None, {"width": 64}, {}),
    ],
)
def test_the_key_changes_with(
    what: str,
    source: Callable[[], ArraySource] | None,
    representations: Callable[[], nn.ModuleDict] | None,
    config: dict[str, Any],
    changes: dict[str, Any],
    tmp_path: Path,
) -> None:
    def run(s: ArraySource, r: nn.ModuleDict, c: CacheConfig, **changes: Any) -> set[str]:
        cache_representations(s, r, c, request=request(tmp_path, **changes))
        return keys(tmp_path)

    first = run(pictures(), built({"hog": {}}, teacher=Teacher()), CacheConfig())
    assert run(pictures(), built({"hog": {}}, teacher=Teacher()), CacheConfig()) == first
    again = run(
        source() if source else pictures(),
        representations() if representations else built({"hog": {}}, teacher=Teacher()),
        CacheConfig(**config),
        **changes,
    )
    # Width concerns only what is projected; settings and weights only what has them; at another size, HOG was built.
    assert len(again - first) == (1 if what in ("settings", "weights", "width", "size") else 2)


def test_the_key_does_not_depend_on_names_or_folders(tmp_path: Path) -> None:
    source = pictures()
    renamed = ArraySource(source.images, None, name="theirs/train")
    cache_representations(source, built({"hog": {}}), CacheConfig(), request=request(tmp_path / "a"))
    two = built({"first": {"kind": "hog"}, "second": {"kind": "hog"}})
    kept = cache_representations(renamed, two, CacheConfig(), request=request(tmp_path / "b", batch_size=3))
    assert keys(tmp_path / "a") == keys(tmp_path / "b")
    assert len(keys(tmp_path / "a")) == 1
    assert torch.equal(kept["first"](torch.arange(20)), kept["second"](torch.arange(20)))


def test_a_whole_cache_is_reused_without_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    (tmp_path / "files").mkdir()
    source = pictures()
    names = [f"{number:02d}.png" for number in range(20)]
    for name, image in zip(names, source.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "files" / name)
    files = FileSource(tmp_path / "files", names, None, name="own/train")
    first = cache_representations(files, built(), CacheConfig(), request=request(tmp_path / "cache", workers=2))
    assert torch.equal(
        first["hog"](torch.arange(20)),
        cache_representations(source, built(), CacheConfig(), request=request(tmp_path))["hog"](torch.arange(20)),
    )

    def refuses(*_: Any) -> Tensor:
        raise AssertionError("an image was read")

    monkeypatch.setattr(FileSource, "read", refuses)
    teacher = Teacher()
    again = cache_representations(files, built(), CacheConfig(), request=request(tmp_path / "cache"))
    assert torch.equal(again["scattering"](torch.arange(20)), first["scattering"](torch.arange(20)))
    with pytest.raises(AssertionError, match="an image was read"):
        cache_representations(files, built({}, teacher=teacher), CacheConfig(), request=request(tmp_path / "cache"))


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "a byte":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "the checksum":
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "too short":
        file.write_bytes(data[:-100])
    elif how == "too long":
        file.write_bytes(data + b"x")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["a byte", "the checksum", "too short", "too long", "gone"])
def test_a_bad_shard_is_found_and_made_again(how: str, tmp_path: Path) -> None:
    source, representations = pictures(), built({"hog": {}}, teacher=Teacher())
    cache_representations(source, representations, CacheConfig(), request=request(tmp_path))
    files = sorted(tmp_path.glob("representations/*/shard-*"))
    assert len(files) == 6
    whole = {file: file.read_bytes() for file in files}
    times = {file: file.stat().st_mtime_ns for file in files}
    damage(files[4], how)
    made: list[tuple[str, int, int]] = []
    asked = request(tmp_path, progress=lambda *now: made.append(now))
    if how == "gone":
        cache_representations(source, representations, CacheConfig(), request=asked)
    else:
        with pytest.warns(UserWarning, match="shard-00001 .*: it is made again"):
            cache_representations(source, representations, CacheConfig(), request=asked)
    assert made[-1] == ("representations", 8, 8)
    assert {file: file.read_bytes() for file in files} == whole
    assert [file for file in files if file.stat().st_mtime_ns != times[file]] == [files[4]]


def test_a_damaged_description_is_written_again(tmp_path: Path) -> None:
    cache_representations(pictures(), built({"hog": {}}), CacheConfig(), request=request(tmp_path))
    (meta,) = tmp_path.glob("representations/*/meta.json")
    described = json.loads(meta.read_text())
    meta.write_text("{")
    assert [(entry.kind, entry.complete) for entry in entries(tmp_path)] == [("?", False)]
    cache_representations(pictures(), built({"hog": {}}), CacheConfig(), request=request(tmp_path))
    again = json.loads(meta.read_text())
    assert {**again, "created": described["created"]} == described
    assert described["key_parts"]["mean"] == list(MEAN)


def test_values_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    large = built({}, teacher=Teacher(factor=1e5))
    with pytest.raises(RunError, match=r"representations\.teacher: image \d+ .* too large.*cache\.dtype=float32"):
        cache_representations(pictures(), large, CacheConfig(), request=request(tmp_path))
    assert not list(tmp_path.glob("representations/*/shard-*"))
    kept = cache_representations(pictures(), large, CacheConfig(dtype="float32"), request=request(tmp_path))
    assert kept["teacher"](torch.arange(20)).abs().max() > 65504
    nan = built({}, teacher=Teacher(factor=float("nan")))
    with pytest.raises(RunError, match=r"representations\.teacher: image 0 has values that are not finite"):
        cache_representations(pictures(), nan, CacheConfig(dtype="float32"), request=request(tmp_path))


def test_images_too_small_and_folders_that_cannot_be_written_are_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HOG with cells of 8"):
        cache_representations(pictures(size=4), built({"hog": {}}), CacheConfig(), request=request(tmp_path, size=4))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=DIR"):
        cache_representations(pictures(), built(), CacheConfig(), request=request(tmp_path / "file"))


def test_no_images(tmp_path: Path) -> None:
    rows = cache_representations(pictures(0), built({"hog": {}}), CacheConfig(), request=request(tmp_path))["hog"]
    assert len(rows) == 0
    assert rows(torch.empty(0, dtype=torch.int64)).shape == (0, rows.width)


def test_clear_removes_the_caches_files_and_nothing_else(tmp_path: Path) -> None:
    cache_representations(pictures(), built(), CacheConfig(), request=request(tmp_path / "cache"))
    place = tmp_path / "cache" / "representations"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-00000").write_text("precious")
    (place / ("0" * 32)).symlink_to(tmp_path / "mine")
    (place / "notes").mkdir()
    first, second, third = entries(tmp_path / "cache")
    (place / first.key / "mine.txt").write_text("precious")
    (place / second.key / "shard-00009").symlink_to(tmp_path / "mine" / "shard-00000")
    with pytest.raises(UserError, match="no cached representation has the key nothing"):
        clear(tmp_path / "cache", [third.key, "nothing"])
    assert clear(tmp_path / "cache", [third.key]) == third.bytes
    with pytest.warns(UserWarning, match="not the cache's"):
        freed = clear(tmp_path / "cache")
    assert freed >= first.bytes + second.bytes
    assert (tmp_path / "mine" / "shard-00000").read_text() == "precious"
    left = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if not path.name.endswith(".lock"))
    assert left == sorted([first.key, f"{first.key}/mine.txt", "notes", "0" * 32])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_rows(tmp_path: Path) -> None:
    source, cuda = pictures(), torch.device("cuda")
    asked = CacheConfig(dtype="float32")
    on_cpu = cache_representations(source, built(), asked, request=request(tmp_path / "cpu"))
    kept = cache_representations(source, built(), asked, request=request(tmp_path / "gpu", device=cuda))
    index = torch.tensor([19, 3, 3, 0])
    for name, rows in kept.items():
        assert torch.allclose(rows(index), on_cpu[name](index), atol=1e-4)
        assert rows.rows(index, cuda).device.type == "cuda"
        assert torch.equal(rows.rows(index, cuda).cpu(), rows(index))
        assert torch.equal(rows.resident(cuda).rows(index, cuda).cpu(), rows(index))
        assert torch.equal(rows.resident(cuda)(index), rows(index))
