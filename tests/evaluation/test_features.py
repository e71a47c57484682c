from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvmr.data.sources import ArraySource
from mvmr.evaluation.features import accuracies, extract, features_of, labelled_pair, placed, write_features
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import Encoder, EncoderCard, random_encoder
from mvmr.ops.modes import evaluating
from mvmr.types import Features, RunError, UserError


def small_encoder(image_size: int = 8) -> Encoder:
    card = EncoderCard(
        encoder=EncoderConfig(width=0.125, stem="cifar"), dim=64, image_size=image_size,
        mean=(0.5,) * 3, std=(0.2,) * 3, method="mvmr", data="digits", version="0.1.0",
    )  # fmt: skip
    return random_encoder(card, 0)


def some_images(count: int = 20, side: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches_of(images: Tensor, order: Tensor, size: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    for index in order.split(size):
        yield index, images[index]


def test_features_come_in_index_order_whatever_the_batches() -> None:
    encoder, images = small_encoder(), some_images()
    with torch.no_grad():
        expected = torch.stack([encoder(image[None])[0] for image in images])
    for order in (torch.arange(20), torch.randperm(20, generator=torch.Generator().manual_seed(1))):
        features = extract(encoder, batches_of(images, order), device="cpu")
        assert features.shape == (20, 64)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    part = extract(encoder, batches_of(images, torch.tensor([7, 3, 11])), device="cpu")
    torch.testing.assert_close(part, expected[[3, 7, 11]], rtol=1e-4, atol=1e-5)


class Awkward(nn.Module):
    """Batch norm with its buffers, dropout, and a part that was frozen in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)
        self.frozen.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.frozen(self.drop(self.norm(images.float()))).flatten(1)


def test_extraction_leaves_no_trace() -> None:
    encoder = Awkward()
    before, flags = copy.deepcopy(encoder.state_dict()), [part.training for part in encoder.modules()]
    assert flags == [True, True, True, False]
    first = extract(encoder, batches_of(some_images(), torch.arange(20)), device="cpu")
    assert torch.equal(first, extract(encoder, batches_of(some_images(), torch.arange(20)), device="cpu"))
    assert [part.training for part in encoder.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_flags_are_put_back_when_extraction_fails() -> None:
    encoder = Awkward()
    flags = [part.training for part in encoder.modules()]
    with pytest.raises(RuntimeError):
        extract(encoder, iter([(torch.arange(2), torch.zeros(2, 4, 8, 8))]), device="cpu")
    assert [part.training for part in encoder.modules()] == flags
    with evaluating(encoder):
        assert not any(part.training for part in encoder.modules())


def test_features_are_float32_ordinary_tensors_even_inside_autocast() -> None:
    encoder, images = small_encoder(), some_images()
    expected = extract(encoder, batches_of(images, torch.arange(20)), device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(encoder, batches_of(images, torch.arange(20)), device="cpu"), expected)
    assert expected.dtype == torch.float32
    assert not expected.requires_grad
    weight = torch.zeros(64, requires_grad=True)
    (expected @ weight).sum().backward()  # not inference tensors: they can be trained on
    torch.testing.assert_close(weight.grad, expected.sum(0))
    half = extract(encoder.bfloat16(), batches_of(images, torch.arange(20)), device="cpu")
    assert half.dtype == torch.float32


def test_no_images() -> None:
    with pytest.raises(UserError, match="no image to extract"):
        extract(small_encoder(), iter(()), device="cpu")


def test_features_of_a_source() -> None:
    labels = torch.arange(20) % 4
    source = ArraySource(some_images(side=8), labels, name="made/train", classes=("a", "b", "c", "d"))
    encoder, seen = small_encoder(), []
    features = features_of(encoder, source, batch_size=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 20), (12, 20), (18, 20), (20, 20)]
    assert torch.equal(features.y, labels)
    assert features.classes == ("a", "b", "c", "d")
    expected = extract(encoder, batches_of(some_images(side=8), torch.arange(20)), device="cpu")
    torch.testing.assert_close(features.x, expected)
    resized = features_of(small_encoder(image_size=16), source)
    assert resized.x.shape == (20, 64)
    assert not torch.allclose(resized.x, features.x)


def test_accuracies_against_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 7), generator=generator).float()  # many ties
    y = torch.randint(0, 7, (50,), generator=generator)
    hits = {1: 0, 5: 0}
    for row, label in zip(scores.tolist(), y.tolist(), strict=True):
        ranked = sorted(range(7), key=lambda c: (-row[c], c))
        for k in hits:
            hits[k] += label in ranked[:k]
    assert accuracies(scores, y) == {"top1": pytest.approx(2 * hits[1]), "top5": pytest.approx(2 * hits[5])}
    assert set(accuracies(scores[:, :5], y % 5)) == {"top1"}


def test_what_cannot_be_evaluated() -> None:
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    good = Features(x, y)
    with pytest.raises(UserError, match="test split has no labels"):
        labelled_pair(good, Features(x))
    with pytest.raises(UserError, match="train split has images without label"):
        labelled_pair(Features(x, y - 1), good)
    with pytest.raises(UserError, match=r"features \[6, 3\] and labels \[5\]"):
        labelled_pair(Features(x, y[:5]), good)
    with pytest.raises(UserError, match="3 dimensions in train and 2 in test"):
        labelled_pair(good, Features(x[:, :2], y))
    with pytest.raises(UserError, match="different classes"):
        labelled_pair(Features(x, y, ("a", "b", "c")), Features(x, y, ("a", "b", "d")))
    with pytest.raises(RunError, match="test split has features that are not finite"):
        labelled_pair(good, Features(x / 0, y))
    assert labelled_pair(Features(x, y, tuple("abcd")), good)[2] == 4


def test_scores_that_are_not_finite_are_no_accuracy() -> None:
    y = torch.arange(5)
    for wrong in (torch.nan, torch.inf):
        scores = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
        scores[3, 7] = wrong
        with pytest.raises(RunError, match="scores of the test images are not finite"):
            accuracies(scores, y)


def test_an_encoder_is_put_back_where_it_was() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.places = nn.Parameter(torch.ones(1)), []

        def to(self, *places: object, **rest: object) -> Watched:
            self.places.append(str(places[0]))
            return self

    net = Watched()
    for place in ("cuda:3", "cpu"):
        with placed(net, place):
            assert net.places.pop() == place
        assert net.places == ["cpu"]
        net.places.clear()
    with pytest.raises(KeyboardInterrupt), placed(net, "cuda:3"):
        raise KeyboardInterrupt
    assert net.places == ["cuda:3", "cpu"]
    with placed(nn.Identity(), "cpu"):  # nothing to move
        pass


@pytest.mark.gpu
def test_an_encoder_comes_back_from_the_gpu() -> None:
    encoder, images = small_encoder(), some_images()
    extract(encoder, batches_of(images, torch.arange(20)), device="cuda")
    assert {value.device.type for value in encoder.state_dict().values()} == {"cpu"}


def test_features_as_a_file(tmp_path: Path) -> None:
    features = Features(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]), ("a", "b"))
    file = tmp_path / "new/x.npz"
    write_features(file, features, ["one.png", "two.png", "three.png"])
    with np.load(file, allow_pickle=False) as content:
        assert content["features"].tolist() == features.x.tolist()
        assert (content["labels"].tolist(), content["classes"].tolist()) == ([0, 1, 0], ["a", "b"])
        assert content["files"].tolist() == ["one.png", "two.png", "three.png"]
    write_features(file, Features(features.x))
    with np.load(file) as content:
        assert content.files == ["features"]
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(RunError, match=r"folder.npz: cannot be written"):
        write_features(tmp_path / "folder.npz", features)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.npz", "new", "x.npz"]
