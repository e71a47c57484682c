"""Teachers by name and from files: what they are given, what they give, and what is said of mistakes."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mvmr.nets.cards import EncoderCard
from mvmr.nets.encoders import EncoderConfig, build_encoder
from mvmr.nets.teachers import load_teacher
from mvmr.nets.weights import load_encoder, save_encoder
from mvmr.types import UserError

VIT = "timm:test_vit"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """An open_clip architecture of a few thousand parameters, known to open_clip while a test runs."""
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    open_clip.factory._MODEL_CONFIGS["tiny-clip"] = config
    yield "tiny-clip"
    del open_clip.factory._MODEL_CONFIGS["tiny-clip"]


def run_folder(folder: Path, config: EncoderConfig, side: int) -> nn.Module:
    torch.manual_seed(1)
    net, dim = build_encoder(config)
    card = EncoderCard(
        encoder=config, dim=dim, image_size=side, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
        method="mvmr", data="digits", version="0",
    )  # fmt: skip
    save_encoder(folder, net, card)
    return net.eval()


def test_timm_vector_and_tokens() -> None:
    images = torch.randn(2, 3, 160, 160)
    vector, tokens = load_teacher(f"{VIT}@random"), load_teacher(f"{VIT}@random", output="features")
    assert (vector.image_size, vector.mean, vector.std) == (160, (0.5,) * 3, (0.5,) * 3)
    assert vector.interpolation == "bicubic"
    assert vector(images).shape == (2, 64)
    made = tokens(images)
    assert (made.shape, tokens.prefix_tokens) == ((2, 101, 64), 1)
    # The vector is the class token: what `prefix_tokens` says stands for no place.
    assert torch.allclose(vector(images), made[:, 0], atol=1e-6)


def test_timm_maps_have_channels_first() -> None:
    swin = load_teacher("timm:swin_tiny_patch4_window7_224@random", output="features")
    assert swin(torch.randn(1, 3, 224, 224)).shape == (1, 768, 7, 7)
    net = load_teacher("timm:test_resnet@random", output="features", image_size=64)
    images = torch.randn(2, 3, 64, 64)
    made = net(images)
    assert made.ndim == 4
    torch.testing.assert_close(made.mean((2, 3)), load_teacher("timm:test_resnet@random")(images))


def test_another_size_resamples_positions() -> None:
    teacher = load_teacher(f"{VIT}@random", image_size=32, output="features")
    assert teacher.image_size == 32
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 5, 64)
    with pytest.raises(UserError, match="does not take images of 33 pixels"):
        load_teacher(f"{VIT}@random", image_size=33)
    with pytest.raises(UserError, match="does not take images of 32 pixels"):
        load_teacher("torchvision:vit_b_32@random", image_size=32)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("shufflenet_v2_x0_5", 1024)]
)
def test_torchvision_loses_its_classifier_alone(name: str, width: int) -> None:
    teacher = load_teacher(f"torchvision:{name}@random")
    whole = torchvision.models.get_model(name, weights=None)
    last = [key for key, module in whole.named_modules() if isinstance(module, nn.Linear)][-1]
    assert set(whole.state_dict()) - set(teacher.net.state_dict()) == {f"{last}.weight", f"{last}.bias"}
    assert teacher(torch.randn(2, 3, 224, 224)).shape == (2, width)
    assert (teacher.image_size, teacher.mean, teacher.interpolation) == (224, (0.485, 0.456, 0.406), "bilinear")


def test_torchvision_maps_average_to_the_vector() -> None:
    images = torch.randn(2, 3, 64, 64)
    maps = load_teacher("torchvision:resnet18@random", output="features")(images)
    assert maps.shape == (2, 512, 2, 2)
    vector = load_teacher("torchvision:resnet18@random")(images)
    torch.testing.assert_close(maps.mean((2, 3)), vector)
    with pytest.raises(UserError, match=r"torchvision's ResNets only; take output=vector"):
        load_teacher("torchvision:mobilenet_v3_small@random", output="features")


def test_frozen_and_copied_as_such() -> None:
    teacher = load_teacher(f"{VIT}@random")
    for net in (teacher, copy.deepcopy(teacher)):
        assert not any(module.training for module in net.train().modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())


def test_random_names_are_the_same_every_time() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = (load_teacher("torchvision:resnet18@random").state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "config", [EncoderConfig(width=0.125, stem="cifar"), EncoderConfig(name=VIT, image_size=32)], ids=["resnet", "vit"]
)
def test_our_own_encoders(config: EncoderConfig, tmp_path: Path) -> None:
    net = run_folder(tmp_path, config, 32)
    teacher = load_teacher(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(images), net(images))
    assert (teacher.image_size, teacher.mean, teacher.std) == (32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    features = load_teacher(str(tmp_path / "encoder.safetensors"), output="features")
    made = features(images)
    if features.prefix_tokens:
        assert made.shape == (2, 5, 64)
        assert torch.allclose(made[:, 0], net(images), atol=1e-6)
    else:
        assert made.shape == (2, 64, 4, 4)
        torch.testing.assert_close(made.mean((2, 3)), net(images))


NESTINGS: dict[str, Any] = {
    "plain": lambda state: state,
    "ddp": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": t for k, t in state.items()}},
    "dino": lambda state: {
        "teacher": {f"backbone.{k}": t for k, t in state.items()} | {"head.mlp.0.weight": torch.zeros(3)},
        "student": {"x": torch.zeros(1)},
    },
}


@pytest.mark.parametrize(
    ("nesting", "ending"), [("plain", "pth"), ("ddp", "ckpt"), ("dino", "bin"), ("plain", "safetensors")]
)
def test_local_weight_files(nesting: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    published = timm.create_model("test_vit").eval()  # with its classifier
    content = NESTINGS[nesting](dict(published.state_dict()))
    file = tmp_path / f"w.{ending}"
    save_file(content, file) if ending == "safetensors" else torch.save(content, file)
    teacher = load_teacher(VIT, weights=file)
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(teacher(images), published.forward_head(published.forward_features(images), pre_logits=True))


def test_local_weights_for_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(7)
    published = torchvision.models.mobilenet_v3_small(weights=None).eval()
    torch.save({"model": published.state_dict()}, tmp_path / "w.pth")
    teacher = load_teacher("torchvision:mobilenet_v3_small", weights=tmp_path / "w.pth")
    published.classifier[3] = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher(images), published(images))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state: dict[str, Tensor] = dict(timm.create_model("test_vit").state_dict())
    file = tmp_path / "w.pth"

    def told(content: Any) -> str:
        torch.save(content, file)
        with pytest.raises(UserError) as error:
            load_teacher(VIT, weights=file)
        assert str(file) in str(error.value)
        return str(error.value)

    assert "it lacks cls_token" in told({k: t for k, t in state.items() if k != "cls_token"})
    assert "it has unknown extra.weight" in told(state | {"extra.weight": torch.zeros(1)})
    assert "pos_embed has shape [1, 50, 64]" in told(state | {"pos_embed": torch.zeros(1, 50, 64)})
    assert "holds no tensors by name" in told({"epoch": 3})
    assert "it lacks" in told({"a": torch.zeros(1)})
    for name, said in (("gone.pth", "no such file"), ("w.txt", "unknown ending"), ("w.safetensors", "not a readable")):
        if name != "gone.pth":
            (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=said):
            load_teacher(VIT, weights=tmp_path / name)
    for model in (f"{VIT}@random", str(tmp_path)):
        with pytest.raises(UserError, match="brings its own weights"):
            load_teacher(model, weights=file)


def test_open_clip_gives_the_projected_embedding(tiny_clip: str, tmp_path: Path) -> None:
    import open_clip

    handlers = list(logging.getLogger().handlers)
    teacher = load_teacher(f"open_clip:{tiny_clip}@random")
    assert logging.getLogger().handlers == handlers
    assert (teacher.image_size, teacher.mean, teacher.std) == (32, CLIP_MEAN, CLIP_STD)
    assert teacher.interpolation == "bicubic"
    torch.manual_seed(3)
    clip = open_clip.create_model(tiny_clip).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    loaded = load_teacher(f"open_clip:{tiny_clip}", weights=tmp_path / "clip.pt")
    with torch.no_grad():
        expected = clip.encode_image(images, normalize=False)
    assert expected.shape == (2, 24)
    torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(teacher(images), expected, atol=0.1)
    maps = load_teacher(f"open_clip:{tiny_clip}", weights=tmp_path / "clip.pt", output="features")(images)
    assert maps.shape == (2, 64, 4, 4)


def test_open_clips_tag_brings_weights_and_constants(
    tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    clip = open_clip.create_model(tiny_clip, force_quick_gelu=True).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tag = {"file": "", "hf_hub": "", "url": f"file://{tmp_path}/clip.pt", "mean": (0.5,) * 3, "std": (0.25,) * 3,
           "interpolation": "bilinear", "quick_gelu": True}  # fmt: skip
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_clip, {"ours": tag})
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / ".cache" / "clip" / "clip.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes((tmp_path / "clip.pt").read_bytes())
    teacher = load_teacher(f"open_clip:{tiny_clip}/ours")
    assert (teacher.mean, teacher.std, teacher.interpolation) == ((0.5,) * 3, (0.25,) * 3, "bilinear")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), clip.encode_image(images), rtol=0, atol=1e-5)
        other = open_clip.create_model(tiny_clip, pretrained=str(cached)).eval()  # with the activation of its name
        assert not torch.allclose(teacher(images), other.encode_image(images), atol=1e-3)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("timm:", "name a model of timm"),
        ("timm:test_vitt@random", r"no model of that name.*test_vit"),
        ("torchvision:resnet19@random", r"no classification model 'resnet19'; close names: resnet1"),
        ("torchvision:squeezenet1_0@random", "ends in no linear classifier"),
        ("open_clip:ViT-B-17/openai", r"no architecture 'ViT-B-17'; close names: .*ViT-B-16"),
        ("open_clip:ViT-B-16/laion", r"ViT-B-16 has no weights 'laion'; .*laion400m_e32.*open_clip:ViT-B-16@random"),
        ("open_clip:ViT-B/16", r"the tag of the weights is missing; write open_clip:ViT-B-16/TAG"),
        ("open_clip:ViT-B-16/openai@random", r"goes without @random: open_clip:ViT-B-16@random"),
        ("nowhere", "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_named_with_the_remedy(model: str, said: str) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match=said):
        load_teacher(model)


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'mvmr\[clip\]'"):
        load_teacher("open_clip:ViT-B-16/openai")


def test_a_released_checkpoint_is_a_teacher_too(tmp_path: Path) -> None:
    net = torchvision.models.resnet18(weights=None)
    torch.save({"state_dict": {f"encoder.{k}": t for k, t in net.state_dict().items()}}, tmp_path / "net.ckpt")
    teacher = load_teacher(str(tmp_path / "net.ckpt"))
    net.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher(images), net.eval()(images))
    assert load_encoder(tmp_path / "net.ckpt").card.image_size == teacher.image_size == 224
