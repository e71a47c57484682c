from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import mvmr.nets.weights as weights
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.weights import Encoder, EncoderCard, load_encoder, random_encoder, read_card, save_encoder
from mvmr.types import UserError

SMALL = EncoderConfig(width=0.125, stem="cifar")


def card_of(config: EncoderConfig = SMALL, dim: int = 64) -> EncoderCard:
    return EncoderCard(
        encoder=config, dim=dim, image_size=16, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.261),
        method="mvmr", data="digits", version="0.1.0",
    )  # fmt: skip


def trained(config: EncoderConfig = SMALL) -> nn.Module:
    torch.manual_seed(1)
    net, _ = build_encoder(config)
    net.train()(torch.randn(8, 3, 16, 16))  # so that the buffers are not those of a new net
    return net


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    net = trained()
    file = save_encoder(tmp_path / "encoder.safetensors", net, card_of())
    for path in (file, str(file), tmp_path, str(tmp_path)):
        loaded = load_encoder(path)
        assert same_state(loaded.backbone, net)
        assert loaded.card == card_of() == read_card(path)
        assert not any(module.training for module in loaded.modules())
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(load_encoder(tmp_path)(images), Encoder(net, card_of()).eval()(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_file_loads_strictly_into_plain_torchvision(tmp_path: Path, name: str) -> None:
    net, dim = build_encoder(EncoderConfig(name=name))
    file = save_encoder(tmp_path, net, card_of(EncoderConfig(name=name), dim))
    with safe_open(file, framework="pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)
        metadata = content.metadata()
    plain = torchvision.models.get_model(name, weights=None)
    plain.fc = nn.Identity()
    plain.load_state_dict(tensors, strict=True)
    read = json.loads(metadata["mvmr"])
    assert (read["method"], read["dim"], read["encoder"]["name"]) == ("mvmr", dim, name)
    assert read["mean"] == [0.491, 0.482, 0.447]


def test_equal_encoders_are_equal_files(tmp_path: Path) -> None:
    # safetensors writes metadata of more than one key in an order that changes from call to call.
    written = {save_encoder(tmp_path, trained(), card_of()).read_bytes() for _ in range(8)}
    assert len(written) == 1


def test_channels_last_compiled_and_tied_weights_are_saved(tmp_path: Path) -> None:
    net = trained()
    compiled = torch.compile(net.to(memory_format=torch.channels_last))
    assert same_state(load_encoder(save_encoder(tmp_path, compiled, card_of())).backbone, net)
    net.layer1[1].bn1.weight = net.layer1[0].bn1.weight
    assert same_state(load_encoder(save_encoder(tmp_path, net, card_of())).backbone, net)


def test_timm_round_trip(tmp_path: Path) -> None:
    config = EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=32)
    net, dim = build_encoder(config)
    loaded = load_encoder(save_encoder(tmp_path, net, card_of(config, dim)))
    assert same_state(loaded.backbone, net)
    assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def test_killed_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = trained()
    file = save_encoder(tmp_path, old, card_of())

    def broken(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        save_encoder(tmp_path, build_encoder(SMALL)[0], card_of())
    assert same_state(load_encoder(file).backbone, old)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_encoder_normalises_and_returns_float32() -> None:
    encoder = Encoder(trained(), card_of()).eval()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    by_hand = torch.stack([(images[:, c] / 255 - card_of().mean[c]) / card_of().std[c] for c in range(3)], 1)
    expected = encoder.backbone(by_hand)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(images / 255), expected, rtol=1e-5, atol=1e-6)
    assert encoder.double()(images).dtype == torch.float32
    assert all(key.startswith("backbone.") for key in encoder.state_dict())


def test_a_backbone_of_another_precision_gets_its_own() -> None:
    encoder = Encoder(trained().double(), card_of()).eval()  # as a float64 run's online evaluation wraps it
    assert encoder(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).dtype == torch.float32


def test_encoder_refuses_what_is_no_image() -> None:
    encoder = Encoder(trained(), card_of())
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\].*\[3, 16, 16\]"):
        encoder(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"uint8.*int64"):
        encoder(torch.zeros(1, 3, 16, 16, dtype=torch.int64))


def test_random_encoder_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (random_encoder(card_of(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)  # the global generator has not moved
    assert same_state(first, again)
    assert not torch.equal(first.backbone.conv1.weight, other.backbone.conv1.weight)
    assert first.card == card_of().model_copy(update={"method": "random"})
    assert not first.training


def test_loading_leaves_the_global_generator(tmp_path: Path) -> None:
    save_encoder(tmp_path, trained(), card_of())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_encoder(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; give a run folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no encoder\.safetensors.*--resume"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="write torchvision:resnet18"):
        load_encoder("resnet18")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Attack:
        def __reduce__(self) -> tuple:
            return Path.touch, (witness,)

    for name, kind in (("encoder.safetensors", "safetensors file"), ("last.ckpt", "checkpoint")):
        (tmp_path / name).write_bytes(pickle.dumps(Attack()))
        with pytest.raises(UserError, match=rf"{name}: is not a readable {kind}"):
            load_encoder(tmp_path / name)
    assert not witness.exists()


def test_empty_and_cut_files(tmp_path: Path) -> None:
    file = save_encoder(tmp_path, trained(), card_of())
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-10]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            load_encoder(file)


def test_foreign_and_damaged_metadata(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"model\.safetensors: its metadata lacks 'mvmr'"):
        load_encoder(file)
    good = card_of().model_dump(mode="json")
    for change in ({"encoder": {"name": "resnet18", "pools": 3}}, {"dim": "many"}, {"mean": [0.5]}, {"added": 1}):
        save_file({"x": torch.zeros(1)}, file, metadata={"mvmr": json.dumps({**good, **change})})
        with pytest.raises(UserError, match="damaged or from a newer version"):
            load_encoder(file)
    for text in ("", "not JSON", "[1]"):
        save_file({"x": torch.zeros(1)}, file, metadata={"mvmr": text})
        with pytest.raises(UserError, match="damaged or from a newer version"):
            load_encoder(file)


def test_weights_that_do_not_fit_the_card(tmp_path: Path) -> None:
    file = save_encoder(tmp_path, trained(), card_of(EncoderConfig(width=0.25, stem="cifar"), 128))
    with pytest.raises(UserError, match="do not fit the architecture"):
        load_encoder(file)
    file = save_encoder(tmp_path, trained(), card_of(dim=65))
    with pytest.raises(UserError, match="65 features, its architecture has 64"):
        load_encoder(file)


def test_random_baselines_by_name() -> None:
    encoder = load_encoder("torchvision:resnet18@random")
    assert encoder.card.encoder.name == "resnet18"
    assert (encoder.card.image_size, encoder.card.method) == (224, "random")
    assert encoder.card.mean == (0.485, 0.456, 0.406)
    assert same_state(encoder, load_encoder("torchvision:resnet18@random"))
    vit = load_encoder("timm:vit_tiny_patch16_224@random")
    assert (vit.card.dim, vit.card.image_size, vit.card.mean) == (192, 224, (0.5, 0.5, 0.5))
    assert vit(torch.zeros(1, 3, 224, 224)).shape == (1, 192)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", r"torchvision:resnet18, torchvision:resnet34, torchvision:resnet50 are known"),
        ("timm:", "name a model of timm"),
        ("timm:resnet10tt", r"no model of that name.*resnet10t"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(name)


def test_pretrained_torchvision_weights_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = torchvision.models.resnet18(weights=None)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(published.state_dict(), cached)
    encoder = load_encoder("torchvision:resnet18")
    published.fc = nn.Identity()
    assert same_state(encoder.backbone, published)
    assert encoder.card.method == "supervised (IMAGENET1K_V1)"
