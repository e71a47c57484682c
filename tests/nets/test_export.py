"""Weights in others' formats: names against hand-written tables, and every tensor back again."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.export import FORMATS, detectron2_name, export
from mvmr.types import RunError, UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoder(name: str = "resnet18", **changes: Any) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(name=name, **changes)
    backbone, dim = build_encoder(config)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    card = EncoderCard(encoder=config, dim=dim, image_size=224, mean=MEAN, std=STD, method="m", data="d", version="0")
    return Encoder(backbone, card).eval()


def table(
    blocks: tuple[int, ...], kernels: tuple[int, ...], *, first_stage_shortcut: bool
) -> dict[str, tuple[str, int]]:
    """{detectron2's module: (torchvision's, kernel size; 0 for a norm)} of a ResNet, written from the two libraries."""
    names = {"stem.conv1": ("conv1", 7), "stem.conv1.norm": ("bn1", 0)}
    for stage, count in enumerate(blocks):
        for block in range(count):
            theirs, ours = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            for number, kernel in enumerate(kernels, 1):
                names[f"{theirs}.conv{number}"] = f"{ours}.conv{number}", kernel
                names[f"{theirs}.conv{number}.norm"] = f"{ours}.bn{number}", 0
            if block == 0 and (stage > 0 or first_stage_shortcut):
                names[f"{theirs}.shortcut"] = f"{ours}.downsample.0", 1
                names[f"{theirs}.shortcut.norm"] = f"{ours}.downsample.1", 0
    return names


TABLES = {
    "resnet18": table((2, 2, 2, 2), (3, 3), first_stage_shortcut=False),
    "resnet50": table((3, 4, 6, 3), (1, 3, 1), first_stage_shortcut=True),
}


def test_some_names_by_hand() -> None:
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn1.bias": "res2.0.conv1.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer3.0.downsample.1.running_mean": "res4.0.shortcut.norm.running_mean",
        "layer4.2.bn3.weight": "res5.2.conv3.norm.weight",
        "layer4.2.conv3.weight": "res5.2.conv3.weight",
    }.items():
        assert detectron2_name(ours) == theirs


@pytest.mark.parametrize("name", TABLES)
def test_detectron2s_file_has_every_tensor_under_its_name(name: str, tmp_path: Path) -> None:
    given = encoder(name)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    done = export(given, "detectron2", tmp_path / "sub" / "backbone.pkl")
    content = pickle.loads(done.file.read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert (content["__author__"], content["matching_heuristics"]) == ("mvmr", True)
    model = content["model"]
    back: dict[str, Tensor] = {}
    for theirs, (ours, kernel) in TABLES[name].items():
        if kernel:
            assert model[f"{theirs}.weight"].shape[2:] == (kernel, kernel)
            back[f"{ours}.weight"] = torch.from_numpy(model.pop(f"{theirs}.weight"))
            continue
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            back[f"{ours}.{part}"] = torch.from_numpy(model.pop(f"{theirs}.{part}"))
    assert model == {}
    assert done.tensors == len(back)
    own = given.backbone.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(value, own[key]) and value.dtype == own[key].dtype for key, value in back.items())
    reference = torchvision.models.get_model(name, weights=None)
    reference.fc = nn.Identity()
    reference.load_state_dict(back, strict=True)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(reference.eval()(images), given.backbone(images))
    assert all(torch.equal(value, given.state_dict()[key]) for key, value in before.items())
    assert [file.name for file in done.file.parent.iterdir()] == ["backbone.pkl"]


def test_the_pickle_needs_no_private_part_of_numpy(tmp_path: Path) -> None:
    file = export(encoder(), "detectron2", tmp_path / "a.pkl").file
    strings, asked = [], set()
    for opcode, argument, _ in pickletools.genops(io.BytesIO(file.read_bytes())):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            asked.add(tuple(strings[-2:]))
    assert len(asked) <= 2
    assert ("numpy", "ndarray") in asked
    assert all(module in ("numpy", "builtins") for module, _ in asked)
    weight = pickle.loads(file.read_bytes())["model"]["stem.conv1.weight"]
    assert isinstance(weight, np.ndarray)
    assert weight.flags.writeable


@pytest.mark.parametrize(("name", "width", "extra"), [
    ("resnet18", 1.0, {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
    ("resnet50", 1.0, {"DEPTH": 50}),
    ("resnet50", 0.5, {"DEPTH": 50, "STEM_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 32, "RES2_OUT_CHANNELS": 128}),
])  # fmt: skip
def test_detectron2s_settings_are_said(name: str, width: float, extra: dict[str, int], tmp_path: Path) -> None:
    given = encoder(name, width=width)
    done = export(given, "detectron2", tmp_path / "a.pkl")
    model = yaml.safe_load(done.notes)["MODEL"]
    assert yaml.safe_load(done.notes)["INPUT"] == {"FORMAT": "RGB"}
    assert model["WEIGHTS"] == str(tmp_path / "a.pkl")
    # detectron2 subtracts and divides in 0 ... 255.
    assert model["PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])
    assert model["PIXEL_STD"] == pytest.approx([58.395, 57.12, 57.375])
    assert model["RESNETS"] == {"STRIDE_IN_1X1": False, **extra}
    weights = pickle.loads(done.file.read_bytes())["model"]
    if "WIDTH_PER_GROUP" in extra:
        assert len(weights["stem.conv1.weight"]) == extra["STEM_OUT_CHANNELS"]
        assert len(weights["res2.0.conv1.weight"]) == extra["WIDTH_PER_GROUP"]
        assert len(weights["res2.0.conv3.weight"]) == extra["RES2_OUT_CHANNELS"]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_torchvision_loads_it_strictly(ending: str, tmp_path: Path) -> None:
    given = encoder("resnet34")
    done = export(given, "torchvision", tmp_path / f"a{ending}")
    tensors = load_file(done.file) if ending == ".safetensors" else torch.load(done.file, weights_only=True)
    net = torchvision.models.resnet34()
    net.fc = nn.Identity()
    net.load_state_dict(tensors, strict=True)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    normalised = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(net.eval()(normalised), given(images))
    names: dict[str, Any] = {"torchvision": torchvision, "torch": torch}
    import safetensors.torch

    names["safetensors"] = safetensors
    exec("\n".join(done.notes.splitlines()[:-1]), names)  # what is said to the reader works
    assert torch.equal(names["net"].conv1.weight, given.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("to", "changes", "name", "message"),
    [
        ("onyx", {}, "a.onnx", r"--to onyx: no such format; known: torchvision, detectron2"),
        ("detectron", {}, "a.pkl", r"did you mean detectron2"),
        ("detectron2", {}, "a.pth", r"--out .*a\.pth: detectron2 is written as \.pkl"),
        ("torchvision", {}, ".pth", r"give a name that ends so"),
        (
            "detectron2",
            {"stem": "cifar"},
            "a.pkl",
            r"stem imagenet, and this encoder was trained with encoder\.stem=cifar",
        ),
        ("torchvision", {"stem": "mvmr"}, "a.pth", r"encoder\.stem=mvmr"),
        ("detectron2", {"width": 0.25}, "a.pkl", r"its resnet18 has width 1\.0.*encoder\.width=0\.25"),
        ("torchvision", {"name": "resnet50", "width": 0.25}, "a.pth", r"its resnet50 has width 1\.0"),
        ("detectron2", {"name": "timm:test_vit"}, "a.pkl", r"takes resnet18, .* this encoder is timm:test_vit"),
        ("torchvision", {"name": "alexnet", "width": 0.1}, "a.pth", r"this encoder is alexnet"),
    ],
)
def test_what_cannot_be_exported_is_named(to: str, changes: dict, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export(encoder(**changes), to, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"before")
    (tmp_path / "b.pth").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export(encoder(), "torchvision", tmp_path / "b.pth")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"cannot be written \(.*No space.*make room"):
        export(encoder(), "torchvision", file)
    assert file.read_bytes() == b"before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.pth", "b.pth"]
    with pytest.raises(RunError, match=r"--out .*a\.pth/c\.pth: cannot be written"):  # a file where a folder should be
        export(encoder(), "torchvision", file / "c.pth")


def test_every_format_is_described() -> None:
    assert all(kind.endings and kind.description for kind in FORMATS.values())
