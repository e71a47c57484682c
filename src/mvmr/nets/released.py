"""Checkpoints of others: read without executing anything in them, and the encoders that MV-MR's authors published."""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvmr.nets.cards import Encoder, EncoderCard, seeded
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.types import IMAGENET_MEAN, IMAGENET_STD, UserError

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".pth.tar")
"""Endings of PyTorch's and Lightning's checkpoints."""
SIZES = {"imagenet": 224, "mvmr": 96}
"""Image sides of the published ImageNet and STL-10 models (MV-MR paper, Section 6), by their stem."""
BLOCKS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
}
"""Blocks of the four stages, and whether a block has three convolutions."""
STEMS: dict[tuple[int, ...], str] = {(3, 7, 7): "imagenet", (3, 3, 3): "mvmr"}
"""Stems by the shape of one filter of the first convolution."""
FIRST = "layer1.0.conv1.weight"
MAGIC_PICKLES = 3
"""How many pickles stand before the content in PyTorch's format from before 1.6."""


@dataclass(frozen=True)
class ReleasedInput:
    """What a published checkpoint does not say about its images; None stands for what its stem suggests."""

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def load_released(
    path: str | Path,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
) -> Encoder:
    """The ResNet-18, -34 or -50 in a checkpoint of PyTorch or Lightning, on the CPU and in eval mode.

    It is found by torchvision's names under whatever prefix; projectors, probes, optimisers and settings beside it are
    left alone. A 3x3 stem is read as "mvmr", which keeps the max-pool. The constants of the images are not in such a
    file: by default ImageNet's, at 224 pixels for the 7x7 stem and at 96 (STL-10) for the 3x3 one.
    Raises UserError that says what was found instead.
    """
    file = Path(path)
    tensors = tensors_of(read_checkpoint(file))
    if not tensors:
        raise UserError(f"{file}: holds no tensors by name (a state_dict); give a checkpoint with an encoder's weights")
    prefix = _prefix(tensors, file)
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    own = {name: t for name, t in own.items() if name.split(".")[0] in ("conv1", "bn1") or name.startswith("layer")}
    config = _config(own, prefix, file)
    net, dim = seeded(lambda: build_encoder(config), seed=0)
    try:
        net.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file}: is no {config.name} under {prefix!r}: {error}") from None
    card = EncoderCard(
        encoder=config, dim=dim, image_size=image_size or SIZES[config.stem], mean=mean or IMAGENET_MEAN,
        std=std or IMAGENET_STD, method="mvmr (released checkpoint)", data="unknown", version="unknown",
    )  # fmt: skip
    return Encoder(net.float(), card).eval()


def read_checkpoint(file: Path) -> Any:
    """What torch.save wrote, on the CPU. Objects other than tensors and plain containers come back empty.

    Nothing foreign is imported or called: PyTorch's restricted reader is given an inert class for every foreign name.
    Raises UserError for files that are missing, damaged, or that ask for modules which that reader never touches.
    """
    try:
        names = _names_in(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a checkpoint written by torch.save") from None
    except (OSError, ValueError, KeyError, IndexError, EOFError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is not a readable checkpoint ({error}); download or copy it again") from None
    problem: Exception | None = None
    # PyTorch sets items of true dictionaries only, and numpy's types have a state that no dictionary takes: one kind of
    # stand-in cannot serve all files.
    for kind in (_Object, _Mapping):
        kinds = {name: _Object if name.startswith("numpy.") else kind for name in sorted(names)}
        inert: list[Any] = [(type(base.__name__, (base,), {}), name) for name, base in kinds.items()]
        try:
            with torch.serialization.safe_globals(inert):
                # Mapped, not read: optimiser states of other nets beside the encoder are never loaded.
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (
            pickle.UnpicklingError,
            RuntimeError,
            TypeError,
            AttributeError,
            ValueError,
            LookupError,
            EOFError,
        ) as e:
            problem = problem or e
    assert problem is not None
    raise UserError(
        f"{file}: cannot be read as a checkpoint without executing code in it ({_reason(problem)}); "
        "write its state_dict alone into a file, with torch.save or safetensors"
    ) from None


def tensors_of(content: Any, within: tuple[str, ...] = ("state_dict", "model", "teacher")) -> dict[str, Tensor]:
    """The tensors by name in what a checkpoint held, at its top or under one of the usual keys; {} without any."""
    if not isinstance(content, Mapping):
        return {}
    for key in within:
        if isinstance(content.get(key), Mapping):
            return tensors_of(content[key], within)
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


class _Object:
    """Stands in for an object of a foreign class or the result of a foreign function; keeps nothing."""

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping(_Object):
    """Stands in for foreign dictionaries, whose items are then set."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


def _reason(problem: Exception) -> str:
    """The line of PyTorch's message that says what was found; the others tell how to switch the protection off."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    told = [line for line in lines if "weights_only" not in line and "Weights only" not in line]
    return (told or lines)[0].removeprefix("WeightsUnpickler error: ").rstrip(".")


def _names_in(file: Path) -> set[str]:
    """Every global name in a checkpoint's pickle, read without executing it."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            inside = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if inside is None:
                raise ValueError("a zip archive without data.pkl")
            return _globals(archive.read(inside))
    with open(file, "rb") as opened:
        for _ in range(MAGIC_PICKLES):
            for _ in pickletools.genops(opened):
                pass
        return _globals(opened)


def _globals(pickled: Any) -> set[str]:
    # PyTorch's reader knows no other instruction that names a global. It looks up Python 2's names under Python 3's.
    found = set()
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            newer = _compat_pickle.IMPORT_MAPPING.get(module, module), name
            found.add(".".join(_compat_pickle.NAME_MAPPING.get((module, name), newer)))
    return found


def _prefix(tensors: Mapping[str, Tensor], file: Path) -> str:
    """What stands before torchvision's names of a ResNet."""
    found = sorted(
        prefix
        for prefix in (name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST))
        if (prefix == "" or prefix.endswith(".")) and f"{prefix}conv1.weight" in tensors
    )
    if not found:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{file}: holds no ResNet by torchvision's names (conv1, bn1, layer1, ...), but {some}, ...; "
                        "give a checkpoint of a ResNet-18, -34 or -50")  # fmt: skip
    if len(found) > 1:
        raise UserError(f"{file}: holds more than one ResNet, under {', '.join(map(repr, found))}; "
                        "write the one to be used into a file of its own")  # fmt: skip
    return found[0]


def _config(tensors: Mapping[str, Tensor], prefix: str, file: Path) -> EncoderConfig:
    """The architecture, from names and shapes."""
    blocks = [re.match(r"layer(\d+)\.(\d+)\.", name) for name in tensors]
    counts = {(int(b[1]), int(b[2])) for b in blocks if b}
    stages = tuple(sum(stage == number for stage, _ in counts) for number in range(1, 5))
    deep = "layer1.0.conv3.weight" in tensors
    name = BLOCKS.get((stages, deep))
    stem = STEMS.get(tuple(tensors["conv1.weight"].shape[1:]))
    if name is None or stem is None:
        raise UserError(
            f"{file}: under {prefix!r} is a ResNet with stages of {stages} {'bottleneck' if deep else 'basic'} blocks "
            f"and a first convolution of {list(tensors['conv1.weight'].shape)}; known are "
            f"{', '.join(BLOCKS.values())} with a 7x7 or 3x3 stem of 3 colours"
        )
    return EncoderConfig.model_validate({"name": name, "stem": stem, "width": len(tensors["conv1.weight"]) / 64})
