"""Checkpoints in the layout of MV-MR's authors, and others that nothing is executed of."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from mvmr.nets.cards import EncoderCard
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.released import load_released, read_checkpoint, tensors_of
from mvmr.nets.weights import ReleasedInput, load_encoder, save_encoder
from mvmr.types import UserError


class Settings(dict):
    """A dictionary of a foreign package, as hyper-parameters are kept in."""

    __module__ = "foreign_package"


class Choice:
    """An object of a foreign package."""

    __module__ = "foreign_package"

    def __init__(self) -> None:
        self.value = 3


def write(content: Any, file: Path, *, legacy: bool = False) -> None:
    """As where the foreign package is installed; here it is not."""
    foreign = ModuleType("foreign_package")
    foreign.Settings, foreign.Choice = Settings, Choice
    sys.modules[foreign.__name__] = foreign
    try:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules[foreign.__name__]


def published(name: str = "resnet18", *, small_kernel: bool = False, width: float = 1.0) -> nn.Module:
    """torchvision's net without classifier, with statistics that are not those of a new one."""
    torch.manual_seed(3)
    if width != 1.0:
        net, _ = build_encoder(EncoderConfig(name=name, width=width))
    else:
        net = torchvision.models.get_model(name, weights=None)
        net.fc = nn.Identity()
    if small_kernel:
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def checkpoint(net: nn.Module, prefix: str, hyper: Any) -> dict[str, Any]:
    """What Lightning writes for a module with an encoder, a projector and an online probe."""
    state = {f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}
    for name, module in (("projector", nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))),
                         ("online_finetuner", nn.Linear(8, 10))):  # fmt: skip
        state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return {
        "epoch": 999, "global_step": 5, "pytorch-lightning_version": "1.5.10",
        "state_dict": collections.OrderedDict(state),
        "callbacks": {Choice: {"best": torch.tensor(0.5), "path": Path("a/b")}}, "lr_schedulers": [],
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": []}],
        "hparams_name": "config", "hyper_parameters": hyper,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "small_kernel", "prefix", "legacy"),
    [("resnet50", False, "encoder.", False), ("resnet18", True, "model.encoder.module.", True),
     ("resnet34", False, "", False)],
)  # fmt: skip
def test_the_published_layout_gives_torchvisions_features(
    name: str, small_kernel: bool, prefix: str, legacy: bool, tmp_path: Path
) -> None:
    net = published(name, small_kernel=small_kernel)
    file = tmp_path / "epoch=999.ckpt"
    hyper = argparse.Namespace(lr=1e-4, choice=Choice(), scale=np.float64(0.5), data=Path("x"))
    write(checkpoint(net, prefix, hyper), file, legacy=legacy)
    encoder = load_encoder(file)
    assert encoder.card.encoder.model_dump() == {
        **EncoderConfig(name=name).model_dump(), "stem": "mvmr" if small_kernel else "imagenet"
    }  # fmt: skip
    assert (encoder.card.method, encoder.card.data) == ("mvmr (released checkpoint)", "unknown")
    assert encoder.card.image_size == (96 if small_kernel else 224)
    assert not any(module.training for module in encoder.modules())
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), net((images - mean) / std), rtol=0, atol=1e-6)


def test_width_and_a_classifier_are_recognised(tmp_path: Path) -> None:
    net = published("resnet50", width=0.125)
    state = {**net.state_dict(), "fc.weight": torch.zeros(10, net.dim), "fc.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "net.pth.tar")
    encoder = load_encoder(tmp_path / "net.pth.tar")
    assert (encoder.card.encoder.width, encoder.card.dim) == (0.125, 256)
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in encoder.backbone.state_dict().items())


def test_the_callers_constants_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "net.ckpt"
    write(checkpoint(published(width=0.125), "encoder.", {}), file)
    given = ReleasedInput(image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    for card in (
        load_encoder(file, released=given).card,
        load_released(file, mean=given.mean, std=given.std, image_size=32).card,
    ):
        assert (card.image_size, card.mean, card.std) == (32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


@pytest.mark.parametrize(
    "hyper", [Settings(lr=1e-4, choice=Choice(), dtype=np.dtype("float32")), Choice(), {"a": Settings()}]
)
def test_foreign_classes_need_not_exist(hyper: Any, tmp_path: Path) -> None:
    net = published(width=0.125)
    write(checkpoint(net, "encoder.", hyper), tmp_path / "net.ckpt")
    encoder = load_encoder(tmp_path / "net.ckpt")
    assert "foreign_package" not in sys.modules
    assert torch.equal(encoder.backbone.conv1.weight, net.conv1.weight)


class Attack:
    """Runs a function of its choice when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("how", ["path", "system", "exec", "nested"])
def test_a_malicious_pickle_does_nothing(how: str, legacy: bool, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    attacks = {
        "path": Attack(Path.touch, witness),
        "system": Attack(os.system, f"touch {witness}"),
        "exec": Attack(exec, f"open({str(witness)!r}, 'w').close()"),
        "nested": Attack(shutil.copy, Attack(str, __file__), witness),
    }
    content = checkpoint(published(width=0.125), "encoder.", {"evil": attacks[how]})
    file = tmp_path / "net.ckpt"
    write(content, file, legacy=legacy)
    refused = {"system": "system", "path": "call"}  # the operating system's modules, and what a function returned
    if how in refused:
        with pytest.raises(UserError, match=rf"net\.ckpt: .* without executing code .*{refused[how]}"):
            load_encoder(file)
    else:
        load_encoder(file)
    assert not witness.exists()
    # The attack is a real one: Python's own reader would run it.
    pickle.loads(pickle.dumps(attacks[how], protocol=2))
    assert witness.exists()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "net.ckpt"
    write(checkpoint(published(width=0.125), "encoder.", {}), file)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"net\.ckpt: (is not a readable checkpoint|cannot be read as a checkpoint)"
        ):
            load_encoder(file)
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        load_released(tmp_path / "gone.pth")


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {f"encoder.{name}": tensor for name, tensor in published(width=0.125).state_dict().items()}
    state |= {name.replace("__", "."): tensor for name, tensor in changes.items() if tensor is not None}
    return {k: t for k, t in state.items() if changes.get(k.replace(".", "__"), t) is not None}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3}, "holds no tensors by name"),
        ([1, 2], "holds no tensors by name"),
        ({"state_dict": {"visual.proj": torch.zeros(1)}}, r"no ResNet by torchvision's names .*visual\.proj"),
        (changed(encoder__layer4__2__conv1__weight=torch.zeros(1)), r"stages of \(2, 2, 2, 3\) basic blocks"),
        (changed(encoder__conv1__weight=torch.zeros(8, 3, 5, 5)), r"first convolution of \[8, 3, 5, 5\]"),
        (changed(encoder__bn1__weight=None), r"is no resnet18 under 'encoder\.': .*bn1\.weight"),
        ({**changed(), **{f"momentum_{k}": t for k, t in changed().items()}},
         r"more than one ResNet, under 'encoder\.', 'momentum_encoder\.'"),
    ],
)  # fmt: skip
def test_what_is_no_such_encoder_is_told(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.ckpt")
    with pytest.raises(UserError, match=rf"(?s)net\.ckpt: .*{said}"):
        load_encoder(tmp_path / "net.ckpt")


def test_a_runs_own_checkpoint_leads_to_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    file = folder / "checkpoints" / "last.ckpt"
    net = published(width=0.125)
    write(checkpoint(net, "method.encoder.", {}), file)
    with pytest.raises(UserError, match=r"last\.ckpt: is a checkpoint .* end it first with `mvmr train --resume`"):
        load_encoder(file)
    card = EncoderCard(
        encoder=EncoderConfig(width=0.125), dim=64, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3,
        method="mvmr", data="digits", version="0",
    )  # fmt: skip
    save_encoder(folder, net, card)
    with pytest.raises(UserError, match="give that folder"):
        load_encoder(file)


def test_tensors_are_found_under_the_usual_keys() -> None:
    x = torch.zeros(1)
    assert tensors_of({"model": {"state_dict": {"x": x, "step": 3}}}) == {"x": x}
    assert tensors_of({"teacher": {"x": x}, "student": {"y": x}}) == {"x": x}
    assert tensors_of({"x": x, 3: x}) == {"x": x}
    assert tensors_of(x) == {}


def test_plain_contents_come_back_as_they_are(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, "x", None, True, (3, 4)], "b": torch.arange(6).view(2, 3)}
    torch.save(content, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")
    assert read["a"] == content["a"]
    assert torch.equal(read["b"], content["b"])
