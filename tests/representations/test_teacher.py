"""The teacher as a representation: what it sees, what it gives, and what identifies it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as T
from PIL import Image
from torch import Tensor, nn

from mvmr.nets.teacher_net import TeacherInput
from mvmr.nets.teachers import load_teacher
from mvmr.representations import Representation, Teacher, build_representations, resolve_settings
from mvmr.types import UserError

MEAN, STD = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
VIT = "timm:test_vit@random"
TORCHVISION = "torchvision:mobilenet_v3_small@random"


def per_channel(values: Any) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def plain_images(count: int = 2, side: int = 32) -> Tensor:
    """Images in [0, 1] with structure at several scales."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=generator)
    fine = torch.rand(count, 3, side, side, generator=generator)
    return (0.7 * F.interpolate(coarse, (side, side)) + 0.3 * fine).clamp(0, 1)


def normalised(plain: Tensor) -> Tensor:
    return (plain - per_channel(MEAN)) / per_channel(STD)


class Small(nn.Module):
    """Some user's network: a vector [B, 4] that batch statistics and dropout would disturb."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.drop(self.norm(self.conv(x))).mean((2, 3))


def small(seed: int = 0, scale: float = 1.0) -> Small:
    torch.manual_seed(seed)
    return Small(scale)


def test_own_input_is_the_image_resized_and_normalised_its_way() -> None:
    plain = plain_images()
    teacher = Teacher(model=TORCHVISION, mean=MEAN, std=STD)
    by_hand = T.resize(plain, [224, 224], T.InterpolationMode.BILINEAR, antialias=True)
    by_hand = T.normalize(by_hand, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(teacher.shown(normalised(plain)), by_hand, rtol=0, atol=1e-5)
    made = teacher(normalised(plain))
    with torch.no_grad():
        torch.testing.assert_close(made, load_teacher(TORCHVISION)(by_hand), rtol=0, atol=1e-4)
    assert made.dtype == torch.float32
    assert not made.requires_grad


@pytest.mark.parametrize(
    ("mode", "pil"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)]
)
@pytest.mark.parametrize("size", [80, 24])
def test_resizing_is_that_of_8_bit_images(mode: Any, pil: Any, size: int) -> None:
    plain = (plain_images(1) * 255).round() / 255
    own = TeacherInput(size, (0.0,) * 3, (1.0,) * 3, mode)
    shown = Teacher.of(lambda x: x, own=own, mean=MEAN, std=STD).shown(normalised(plain))
    pixels = (plain[0].permute(1, 2, 0) * 255).round().byte().numpy()
    reference = torch.from_numpy(np.array(Image.fromarray(pixels).resize((size, size), pil))).permute(2, 0, 1) / 255
    # Pillow rounds and clips after each of its two passes.
    assert (shown[0] - reference).abs().max() < (3 if mode == "bicubic" else 1.01) / 255
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_student_input_is_the_normalised_tensor_resized_as_it_is() -> None:
    images = normalised(plain_images())
    teacher = Teacher(model=VIT, input="student", mean=MEAN, std=STD)
    by_hand = F.interpolate(images, size=160, mode="bilinear", align_corners=False)
    assert torch.equal(teacher.shown(images), by_hand)
    with torch.no_grad():
        assert torch.equal(teacher(images), load_teacher(VIT)(by_hand))
    assert not torch.allclose(teacher(images), Teacher(model=VIT, mean=MEAN, std=STD)(images), atol=0.1)


def test_tokens_are_averaged_over_places_or_flattened() -> None:
    images = normalised(plain_images())
    own = {"model": VIT, "output": "features", "image_size": 32, "mean": MEAN, "std": STD}
    mean, flat = Teacher(**own), Teacher(**own, pooling="flatten")
    net = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    net.load_state_dict(mean.net.net.state_dict())
    with torch.no_grad():
        tokens = net.forward_features(mean.shown(images))  # [2, 1 + 4, 64]
    torch.testing.assert_close(mean(images), tokens[:, 1:].mean(1))
    torch.testing.assert_close(flat(images), tokens.flatten(1))
    assert not torch.allclose(mean(images), tokens.mean(1), atol=1e-3)


def test_maps_are_averaged_or_flattened() -> None:
    images = normalised(plain_images())
    own = {"model": "torchvision:resnet18@random", "output": "features", "image_size": 64}
    flat = Teacher(**own, pooling="flatten")(images)
    assert flat.shape == (2, 512 * 4)
    torch.testing.assert_close(Teacher(**own)(images), flat.view(2, 512, 4).mean(2))


@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 5), (2, 5, 3, 4)])
@pytest.mark.parametrize("pooling", ["mean", "flatten"])
def test_functions_of_any_output_shape(shape: tuple[int, ...], pooling: Any) -> None:
    made = torch.randn(shape)
    got = Teacher.of(lambda images: made, pooling=pooling, prefix_tokens=2)(torch.randn(2, 3, 8, 8))
    if pooling == "flatten" or len(shape) == 2:
        expected = made.reshape(2, -1)
    else:
        expected = made[:, 2:].mean(1) if len(shape) == 3 else made.mean((2, 3))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"last": torch.zeros(2, 3)}, r"gives a dict, not one tensor; wrap it in a function"),
        ((torch.zeros(2, 3),), "gives a tuple"),
        (torch.zeros(2), r"gives \[2\] for 2 images"),
        (torch.zeros(3, 4), r"gives \[3, 4\] for 2 images"),
        (torch.zeros(2, 1, 4), "1 tokens, of which 1 would be left out"),
    ],
)
def test_other_outputs_are_refused(made: Any, said: str) -> None:
    teacher = Teacher.of(lambda images: made, prefix_tokens=1)
    with pytest.raises(UserError, match=said):
        teacher(torch.randn(2, 3, 8, 8))


def test_images_are_square_rgb() -> None:
    teacher = Teacher.of(small(), own=TeacherInput(image_size=8))
    with pytest.raises(UserError, match="square RGB images, not 3x8x9"):
        teacher(torch.randn(2, 3, 8, 9))
    with pytest.raises(UserError, match="square RGB images, not 1x8x8"):
        teacher(torch.randn(2, 1, 8, 8))


def test_modules_see_the_runs_images_unless_they_say_otherwise() -> None:
    images = normalised(plain_images())
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)

    Teacher.of(look, mean=MEAN, std=STD)(images)
    Teacher.of(look, own=TeacherInput(None, (0.5,) * 3, (0.25,) * 3), mean=MEAN, std=STD)(images)
    torch.testing.assert_close(seen[0], images, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[1], (plain_images() - 0.5) / 0.25, rtol=0, atol=1e-5)


def test_frozen_in_eval_mode_and_the_users_module_untouched() -> None:
    given = small().train()
    teacher = Teacher.of(given)
    images = torch.randn(4, 3, 8, 8)
    first = teacher(images)
    holder = nn.ModuleDict({"t": teacher}).train()
    for module in (teacher, copy.deepcopy(teacher)):
        module.train()
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert torch.equal(module(images), first)  # no dropout, no statistics of the batch
    assert holder.training
    assert given.training
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert not teacher(images.requires_grad_()).requires_grad


def test_half_precision_modules_get_their_own_type() -> None:
    teacher = Teacher.of(small().to(torch.bfloat16))
    assert teacher(torch.randn(2, 3, 8, 8)).dtype == torch.float32


def test_fingerprints_tell_weights_and_settings_apart() -> None:
    makers: dict[str, Callable[[], Teacher]] = {
        "module": lambda: Teacher.of(small()),
        "weights": lambda: Teacher.of(small(seed=1)),
        "attribute": lambda: Teacher.of(small(scale=2.0)),
        "structure": lambda: Teacher.of(nn.Sequential(small())),
        "input": lambda: Teacher.of(small(), input="student"),
        "pooling": lambda: Teacher.of(small(), pooling="flatten"),
        "own": lambda: Teacher.of(small(), own=TeacherInput(image_size=8)),
        "run": lambda: Teacher.of(small(), mean=MEAN),
        "named": lambda: Teacher(model=VIT),
        "features": lambda: Teacher(model=VIT, output="features"),
        "size": lambda: Teacher(model=VIT, image_size=32),
    }
    digits = {name: make().fingerprint() for name, make in makers.items()}
    assert len(set(digits.values())) == len(makers)
    assert None not in digits.values()
    assert {name: make().fingerprint() for name, make in makers.items()} == digits
    assert copy.deepcopy(makers["named"]()).fingerprint() == digits["named"]
    assert Teacher.of(lambda x: x).fingerprint() is None


def test_the_fingerprint_is_of_the_content_and_not_of_the_path(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / name)
    state["cls_token"] = state["cls_token"] + 1
    torch.save(state, tmp_path / "c.pth")
    digits = [Teacher(model="timm:test_vit", weights=tmp_path / f"{name}.pth").fingerprint() for name in "abc"]
    assert digits[0] == digits[1] != digits[2]


def test_settings_build_several_teachers_under_names_of_their_own() -> None:
    settings = {
        "first": {"kind": "teacher", "model": VIT, "image_size": 32},
        "second": {"kind": "teacher", "model": VIT, "image_size": 32, "input": "student"},
        "pixels": {},
    }
    resolved = resolve_settings(settings)
    assert resolved["first"] == {
        "kind": "teacher", "model": VIT, "weights": None, "input": "own", "output": "vector", "pooling": "mean",
        "image_size": 32, "interpolation": None,
    }  # fmt: skip
    assert resolve_settings(resolved) == resolved
    built = build_representations(resolved, mean=MEAN, std=STD)
    first, second = built["first"], built["second"]
    assert isinstance(first, Teacher)
    assert isinstance(second, Teacher)
    assert (first.mean, first.std, first.learned, first.varies) == (MEAN, STD, True, False)
    images = normalised(plain_images())
    assert first(images).shape == second(images).shape == (2, 64)
    assert first.fingerprint() != second.fingerprint()
    built.train()
    assert not any(module.training for module in first.modules())


def test_teachers_from_python_join_under_their_names() -> None:
    images = normalised(plain_images())
    given = {"a": small(), "b": lambda x: x.flatten(1), "c": Teacher.of(small(), pooling="flatten")}
    settings = {"a": {"kind": "teacher", "model": "python", "image_size": 16, "input": "student"}, "pixels": {}}
    assert resolve_settings(settings)["a"]["model"] == "python"
    built = build_representations(settings, mean=MEAN, std=STD, teachers=given)
    assert list(built) == ["a", "pixels", "b", "c"]
    teachers = [built[name] for name in "abc"]
    assert all(isinstance(teacher, Teacher) and (teacher.mean, teacher.std) == (MEAN, STD) for teacher in teachers)
    assert built["a"].shown(images).shape == (2, 3, 16, 16)
    assert [built[name](images).shape[1] for name in "abc"] == [4, 3 * 32 * 32, 4]
    assert built["a"].fingerprint()
    assert built["b"].fingerprint() is None
    assert isinstance(built["a"], Representation)


@pytest.mark.parametrize(
    ("settings", "teachers", "said"),
    [
        ({"t": {"kind": "teacher", "model": "python"}}, {},
         r"representations\.t: was given from Python: pass it again with mvmr\.train\(\.\.\., teachers="),
        ({"t": {"kind": "teacher", "model": VIT}}, {"t": small()}, r"representations\.t: .*given from Python too"),
        ({"pixels": {}}, {"pixels": small()}, r"representations\.pixels: .*given from Python too"),
        ({}, {"a.b": small()}, r"representations\.a\.b: cannot be a name"),
        ({}, {"t": 3}, r"representations\.t: a teacher is a module, or a function .*not a int"),
        ({"teacher": {}}, {}, r"representations\.teacher\.model: must be given, for example timm:"),
        ({"teacher": {"model": VIT, "interpolation": "bicubic", "input": "student"}}, {}, "no effect with input=st"),
        ({"teacher": {"model": VIT, "pooling": "flatten"}}, {}, "no effect on a vector; set output=features"),
        ({"teacher": {"model": VIT, "image_size": 0}}, {}, "image_size=0"),
        ({"teacher": {"model": VIT, "output": "tokens"}}, {}, r"representations\.teacher\.output: .*'features'"),
        ({"teacher": {"model": "timm:test_vitt@random"}}, {}, r"representations\.teacher: .*no model of that name"),
        ({"teacher": {"model": VIT, "std": [1, 1, 0]}}, {}, "three positive deviations"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_remedy(settings: Any, teachers: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_representations(settings, teachers=teachers)


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    class Stubborn(Small):
        def __deepcopy__(self, memo: Any) -> Small:
            raise RuntimeError("only leaf tensors")

    with pytest.raises(UserError, match=r"cannot be \(only leaf tensors\); give a function"):
        Teacher.of(Stubborn())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_and_ignores_autocast() -> None:
    images = normalised(plain_images())
    teacher = Teacher(model="torchvision:resnet18@random", image_size=64, mean=MEAN, std=STD)
    expected, digits = teacher(images), teacher.fingerprint()
    moved = copy.deepcopy(teacher).cuda()
    moved._digest = None
    assert moved.fingerprint() == digits
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(moved(images.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
