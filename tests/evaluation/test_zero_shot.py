"""Zero-shot classification against open_clip's own functions and a loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from mvmr.data.images import ArraySource, FileSource
from mvmr.evaluation.features import features_of
from mvmr.evaluation.workplace import Workplace
from mvmr.evaluation.zero_shot import (
    ZeroShotConfig,
    class_names,
    clip_view,
    similarities,
    text_embeddings,
    zero_shot,
    zero_shot_metrics,
)
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.clip_encoder import ClipTowers, load_clip
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.teachers import load_teacher
from mvmr.nets.weights import random_encoder
from mvmr.types import Features, RunError, UserError

open_clip = pytest.importorskip("open_clip")
NAMES = ("red", "green", "blue", "black", "white", "grey_hat", "stop_sign")
PLACE = Workplace(torch.device("cpu"))


@pytest.fixture(scope="module")
def clip() -> Iterator[Encoder]:
    """A random CLIP of a few layers, known to open_clip while the tests run."""
    open_clip.factory._MODEL_CONFIGS["tiny-zero-shot"] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    yield load_clip("open_clip:tiny-zero-shot@random")
    del open_clip.factory._MODEL_CONFIGS["tiny-zero-shot"]


def images(count: int = 20, classes: int = 7, side: int = 40) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return ArraySource(values, labels, name="ours/test", classes=NAMES[:classes])


def test_it_is_open_clips_own_classifier(clip: Encoder) -> None:
    towers = clip.backbone
    assert isinstance(towers, ClipTowers)
    templates = ("a photo of a {}.", "a drawing of the {}, indoors.")
    names = [name.replace("_", " ") for name in NAMES]
    source, config = images(), ZeroShotConfig(templates=templates, batch_size=3)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    found = zero_shot(clip, source, source, config, PLACE)
    weights = open_clip.build_zero_shot_classifier(
        towers.clip, open_clip.get_tokenizer("tiny-zero-shot"), names, templates
    )  # [D, C]
    torch.testing.assert_close(text_embeddings(towers, names, templates, batch_size=3), weights.T, rtol=0, atol=1e-6)
    normalise = v2.Normalize(clip.card.mean, clip.card.std)
    right: dict[int, list[float]] = {1: [], 5: []}
    assert source.labels is not None
    for image, label in zip(source.images, source.labels.tolist(), strict=True):
        seen = v2.CenterCrop(32)(v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True)(image))
        with torch.no_grad():
            vector = towers.clip.encode_image(normalise(seen.float() / 255)[None], normalize=True)
        order = (vector @ weights)[0].argsort(descending=True).tolist()
        for depth, each in right.items():
            each.append(100.0 * (label in order[:depth]))
    assert found == {f"top{depth}": pytest.approx(sum(each) / len(each)) for depth, each in right.items()}
    assert found.outcomes["top1"].tolist() == right[1]
    assert 0 < found["top5"] < 100
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


def test_the_image_is_what_open_clips_own_transform_makes(clip: Encoder, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for height, width in ((50, 75), (75, 51), (32, 32), (20, 30)):
        smooth = torch.rand(3, height // 5, width // 5, generator=generator)
        image = (torch.nn.functional.interpolate(smooth[None], size=(height, width), mode="bilinear")[0] * 255).byte()
        transform = open_clip.image_transform(32, is_train=False, mean=clip.card.mean, std=clip.card.std)
        expected = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (clip.card.mean, clip.card.std))
        found = (clip_view(image, 32).float() / 255 - mean) / std
        assert found.shape == expected.shape
        assert ((found - expected) * std * 255).abs().max() < 2.01  # PIL rounds after each axis
    assert clip_view(image, 32, fit="squash").shape == (3, 32, 32)


def test_features_are_those_of_the_image_tower(clip: Encoder) -> None:
    source = images(side=32)
    features = features_of(clip, source)
    assert (clip.card.image_size, clip.card.dim, features.x.shape) == (32, 24, (20, 24))
    assert isinstance(clip.backbone, ClipTowers)
    scores = similarities(features.x, text_embeddings(clip.backbone, NAMES, ("{}",)))
    assert scores.abs().max() <= 1.0 + 1e-6
    assert clip.card.method == "random"
    views = torch.randn(2, 3, 32, 32)
    teacher = load_teacher("open_clip:tiny-zero-shot@random")
    torch.testing.assert_close(clip.backbone(views), teacher(views), rtol=0, atol=1e-5)
    assert (clip.card.mean, clip.card.std) == (teacher.mean, teacher.std)


def test_plain_embeddings_suffice() -> None:
    texts = torch.eye(7, 9)
    x = torch.tensor([0, 1, 2, 3]).unsqueeze(1).eq(torch.arange(9)).float() * torch.tensor([[2.0], [5.0], [0.1], [1.0]])
    x[3, 6] = 3.0
    metrics = zero_shot_metrics(Features(x, torch.tensor([0, 1, 0, 3])), texts)
    assert metrics == {"top1": 50.0, "top5": 100.0}
    assert metrics.outcomes["top1"].tolist() == [100.0, 100.0, 0.0, 0.0]
    # A class whose sentences all agree has their vector; equal similarities count for the lower class.
    assert zero_shot_metrics(Features(torch.ones(1, 9), torch.tensor([0])), texts)["top1"] == 100.0
    assert zero_shot_metrics(Features(torch.ones(1, 9), torch.tensor([1])), texts)["top1"] == 0.0


def test_length_and_a_common_rotation_change_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    x, texts, turn = (torch.randn(*size, generator=generator).double() for size in ((50, 9), (7, 9), (9, 9)))
    y = torch.randint(0, 7, (50,), generator=generator)
    rotation, lengths = torch.linalg.qr(turn)[0], torch.rand(50, 1, generator=generator) + 0.1
    first = zero_shot_metrics(Features(x, y), texts)
    second = zero_shot_metrics(Features(lengths * x @ rotation, y), 3 * texts @ rotation)
    assert first == second
    assert torch.equal(first.outcomes["top1"], second.outcomes["top1"])
    assert 0 < first["top1"] < 100


def test_class_names_of_the_data_or_of_a_file(tmp_path: Path) -> None:
    source = images()
    assert class_names(source, ZeroShotConfig())[-2:] == ("grey hat", "stop sign")
    file = tmp_path / "names.txt"
    file.write_text("\n".join("abcdefg") + "\n")
    assert class_names(source, ZeroShotConfig(class_names=file)) == tuple("abcdefg")
    file.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"names\.txt has 2 names and ours/test has 7 classes"):
        class_names(source, ZeroShotConfig(class_names=file))
    with pytest.raises(UserError, match=r"zero_shot\.class_names: .*absent\.txt cannot be read"):
        class_names(source, ZeroShotConfig(class_names=tmp_path / "absent.txt"))
    file.write_text("\n".join("aacdefg"))
    with pytest.raises(UserError, match="'a' occurs twice"):
        class_names(source, ZeroShotConfig(class_names=file))
    for classes, message in ((("n01440764", "n01443537"), "WordNet's numbers"), ((), "has no class names")):
        values = ArraySource(
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), name="x", classes=classes
        )
        with pytest.raises(UserError, match=message):
            class_names(values, ZeroShotConfig())


def test_mistakes_are_named(clip: Encoder, tmp_path: Path) -> None:
    card = EncoderCard(encoder=EncoderConfig(width=0.125), dim=64, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3,
                       method="m", data="d", version="0")  # fmt: skip
    with pytest.raises(UserError, match=r"text tower: give open_clip:ARCH/TAG .*; this one is resnet18"):
        zero_shot(random_encoder(card, seed=0), images(), images(), ZeroShotConfig(), PLACE)
    for templates in ((), ("a photo",), ("{} {}",), ("{0}",)):
        with pytest.raises(ValueError, match=r"one \{\} for the class name"):
            ZeroShotConfig(templates=templates)
    several = ArraySource(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int8), name="x",
                          classes=("a", "b"))  # fmt: skip
    with pytest.raises(UserError, match="several classes an image"):
        zero_shot(clip, several, several, ZeroShotConfig(), PLACE)
    x = torch.randn(3, 8)
    with pytest.raises(UserError, match="use one model"):
        zero_shot_metrics(Features(x, torch.zeros(3).long()), torch.randn(2, 9))
    with pytest.raises(UserError, match="has class 2 and there are 2 class names"):
        zero_shot_metrics(Features(x, torch.tensor([0, 1, 2])), torch.randn(2, 8))
    with pytest.raises(RunError, match="not finite"):
        zero_shot_metrics(Features(x, torch.zeros(3).long()), torch.full((2, 8), float("nan")))
    with pytest.raises(UserError, match="no architecture 'tiny-zero-shut'"):
        load_clip("open_clip:tiny-zero-shut@random")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    source = FileSource(tmp_path, ["a.png"], torch.tensor([0]), name="files", classes=("a", "b"))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"a\.png: the file is empty: it was readable before"):
        zero_shot(clip, source, source, ZeroShotConfig(), PLACE)


def test_progress_counts_images(clip: Encoder) -> None:
    told: list[tuple[str, int, int]] = []
    place = Workplace(torch.device("cpu"), progress=lambda *each: told.append(each))
    zero_shot(clip, images(), images(), ZeroShotConfig(batch_size=8), place)
    assert told == [("embedding images", done, 20) for done in (8, 16, 20)]


def test_a_copy_gives_the_same(clip: Encoder) -> None:
    import copy

    one, other = clip.backbone, copy.deepcopy(clip.backbone)
    assert isinstance(one, ClipTowers)
    assert isinstance(other, ClipTowers)

    def vectors(towers: ClipTowers) -> Tensor:
        return text_embeddings(towers, NAMES, ("{}",))

    assert torch.equal(vectors(one), vectors(other))
