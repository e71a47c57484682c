"""The evaluation `diagnostics`, and features of several views: their parts, their randomness, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path

import dcor
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mvmr.data.images import ArraySource, FileSource, subset
from mvmr.data.views import ViewMaker
from mvmr.evaluation import diagnostics as module
from mvmr.evaluation import view_features as views_module
from mvmr.evaluation.diagnostics import FIXED, DiagnosticsConfig, diagnostics, embedding_std, fixed_rows, rankme
from mvmr.evaluation.features import features_of
from mvmr.evaluation.spectra import alignment, alpha_req, effective_dimension, lidar, uniformity
from mvmr.evaluation.view_features import several_views, view_features
from mvmr.evaluation.workplace import Workplace
from mvmr.nets.cards import Encoder, EncoderCard
from mvmr.nets.encoders import EncoderConfig
from mvmr.nets.weights import random_encoder
from mvmr.ops.random import permutation
from mvmr.types import RunError, UserError

CPU = Workplace(torch.device("cpu"))
SIDE = 16
FEW = DiagnosticsConfig(images=60, pair_images=30, view_images=12, views=4)


def card(dim: int) -> EncoderCard:
    return EncoderCard(
        encoder=EncoderConfig(width=0.125, stem="mvmr", zero_init_residual=False), dim=dim, image_size=SIDE,
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), method="none", data="none", version="0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return random_encoder(card(64), seed=0)


def flat(dim: int = 3 * SIDE**2) -> Encoder:
    return Encoder(nn.Flatten(), card(dim))


def photographs(count: int, side: int = SIDE, seed: int = 0) -> ArraySource:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    return ArraySource((images * 255).to(torch.uint8), None, name=f"photographs/{seed}")


def test_it_needs_no_label_and_says_what_its_parts_say(encoder: Encoder) -> None:
    source, seen = photographs(80), set()
    place = Workplace(CPU.device, progress=lambda what, done, total: seen.add(what))
    metrics = diagnostics(encoder, source, photographs(10, seed=1), FEW, place)
    assert seen == {"features of photographs/0", "views of photographs/0"}
    order = permutation(0, 0, 80)[:60]
    x = features_of(encoder, subset(source, order)).x
    law = alpha_req(x)
    assert law is not None
    expected = {
        "rankme": rankme(x), "alpha": law.exponent, "alpha_r2": law.r2, "effective_dim": effective_dimension(x),
        "embedding_std": embedding_std(x), "std_mean": x.double().std(0, correction=0).mean().item(),
        "std_least": x.double().std(0, correction=0).min().item(), "uniformity": uniformity(x[:30]),
    }  # fmt: skip
    settings = several_views("simclr", size=SIDE, count=4)
    views = view_features(encoder, source, order[:12], settings, CPU)
    expected |= {"lidar": lidar(views), "alignment": alignment(views)}
    images = source.images[order[:30]]
    normalised = (images / 255 - torch.tensor(card(1).mean).view(3, 1, 1)) / torch.tensor(card(1).std).view(3, 1, 1)
    for name, kind in FIXED.items():
        rows = kind()(normalised).double().numpy()
        expected[f"dependence/{name}"] = dcor.u_distance_correlation_sqr(x[:30].double().numpy(), rows)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 1 < metrics["lidar"] < 11


def test_the_images_are_those_of_the_split_and_the_seed(encoder: Encoder) -> None:
    train, test = photographs(40), photographs(50, seed=1)
    light = FEW.model_copy(update={"view_images": 0, "representations": ()})
    of_train = diagnostics(encoder, train, test, light, CPU)
    assert {"lidar", "alignment", "dependence/pixels"} & of_train.keys() == set()
    assert diagnostics(encoder, train, test, light, CPU) == of_train
    of_test = diagnostics(encoder, train, test, light.model_copy(update={"split": "test"}), CPU)
    assert of_test == diagnostics(encoder, test, train, light, CPU)
    assert of_test != of_train
    other = light.model_copy(update={"images": 20, "seed": 1})
    assert diagnostics(encoder, train, test, other, CPU) != diagnostics(
        encoder, train, test, other.model_copy(update={"seed": 0}), CPU
    )


def test_the_encoder_stays_as_it_is(encoder: Encoder) -> None:
    mine = copy.deepcopy(encoder).train()
    before = copy.deepcopy(mine.state_dict())
    diagnostics(mine, photographs(20), photographs(8), FEW, CPU)
    assert mine.training
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_pixels_depend_on_pixels() -> None:
    config = FEW.model_copy(update={"representations": ("pixels",), "view_images": 0})
    assert diagnostics(flat(), photographs(50), photographs(9), config, CPU)["dependence/pixels"] == pytest.approx(1.0)


def test_wide_representations_are_projected(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photographs(200)
    exact = fixed_rows("local_std", encoder, source, CPU)
    assert exact.shape == (200, 3 * SIDE**2)
    monkeypatch.setattr(module, "WIDEST", 256)
    narrow = fixed_rows("local_std", encoder, source, CPU)
    assert narrow.shape == (200, 256)
    ratio = torch.pdist(narrow) / torch.pdist(exact)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.15


def test_a_collapsed_encoder_shows() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :12] * 0 + torch.arange(12.0)

    metrics = diagnostics(Encoder(Constant(), card(12)), photographs(40), photographs(9), FEW, CPU)
    assert "alpha" not in metrics  # no direction to fit a line through
    assert metrics["rankme"] == pytest.approx(1, abs=1e-4)
    zero = ("effective_dim", "embedding_std", "std_mean", "uniformity", "alignment", "lidar", "dependence/hog")
    assert all(metrics[name] == pytest.approx(0, abs=1e-9) for name in zero)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs 8 images, and photographs/0 has 7"):
        diagnostics(flat(), photographs(7), photographs(9), FEW, CPU)
    small = Encoder(nn.Flatten(), card(48).model_copy(update={"image_size": 4}))
    with pytest.raises(UserError, match=r"diagnostics.representations: leave hog out \(HOG with cells of 8 pixels"):
        diagnostics(small, photographs(9, 4), photographs(9, 4), FEW, CPU)
    with pytest.raises(ValueError, match=r"no fixed representation 'hogg' \(did you mean hog\?\)"):
        DiagnosticsConfig(representations=("hogg",))
    with pytest.raises(ValueError, match=r"no views 'simcrl' \(did you mean simclr\?\)"):
        DiagnosticsConfig(recipe="simcrl")

    class Diverged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * torch.nan

    with pytest.raises(RunError, match="features of photographs/0 are not finite"):
        diagnostics(Encoder(Diverged(), card(768)), photographs(9), photographs(9), FEW, CPU)


# ---- features of several views


def test_views_are_those_of_the_view_maker(encoder: Encoder) -> None:
    source, positions = photographs(30), torch.tensor([7, 0, 22])
    settings = several_views("simclr", size=SIDE, count=5)
    found = view_features(encoder, source, positions, settings, CPU, seed=4)
    assert found.shape == (3, 5, 64)
    maker = ViewMaker(settings, mean=card(1).mean, std=card(1).std, seed=4)
    views = maker(source.images[positions], positions, 0)["global"]  # [5, 3, 3, S, S], normalised
    with torch.no_grad():
        expected = torch.stack([encoder.backbone(each) for each in views], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.std(1).mean() > 1e-3


def test_a_view_depends_on_its_image_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source, settings = photographs(30), several_views("simclr", size=SIDE, count=5)
    whole = view_features(flat(), source, torch.arange(30), settings, CPU)
    some = view_features(flat(), source, torch.tensor([9, 3]), settings, CPU)
    torch.testing.assert_close(some, whole[[9, 3]], rtol=0, atol=1e-5)
    fewer = view_features(flat(), source, torch.arange(30), several_views("simclr", size=SIDE, count=2), CPU)
    torch.testing.assert_close(fewer, whole[:, :2], rtol=0, atol=1e-5)
    monkeypatch.setattr(views_module, "VIEWS_AT_A_TIME", 1)
    monkeypatch.setattr(views_module, "PIXELS_AT_A_TIME", 1)
    torch.testing.assert_close(
        view_features(flat(), source, torch.arange(30), settings, CPU), whole, rtol=0, atol=1e-5
    )  # fmt: skip
    assert not torch.equal(view_features(flat(), source, torch.arange(30), settings, CPU, seed=1), whole)


def test_mirror_images_can_be_left_out() -> None:
    mirrored = several_views("mvmr_cifar", size=SIDE, count=40)
    upright = several_views("mvmr_cifar", size=SIDE, count=40, flip=False)
    ramp = torch.arange(SIDE, dtype=torch.uint8).mul(15).expand(1, 3, SIDE, SIDE).contiguous()
    source = ArraySource(ramp, None, name="ramp/train")
    for settings, both in ((mirrored, True), (upright, False)):
        rows = view_features(flat(), source, torch.tensor([0]), settings, CPU)[0].view(40, 3, SIDE, SIDE)
        falls = rows[:, 0, SIDE // 2, 6] > rows[:, 0, SIDE // 2, 9]
        assert bool(falls.any()) is both
    assert upright.counts() == {"global": 40}


def test_files_of_any_size_give_views_too(tmp_path: Path) -> None:
    sizes = [(20, 30), (40, 24), (33, 33)]
    for i, (height, width) in enumerate(sizes):
        pixels = torch.nn.functional.interpolate(photographs(1, 40, seed=i).images.float(), (height, width))
        Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy()).save(tmp_path / f"{i}.png")
    source = FileSource(tmp_path, [f"{i}.png" for i in range(3)], None, name="files/train")
    settings = several_views("simclr", size=SIDE, count=3)
    found = view_features(flat(), source, torch.arange(3), settings, CPU)
    assert found.shape == (3, 3, 3 * SIDE**2)
    alone = view_features(flat(), source, torch.tensor([2]), settings, CPU)
    torch.testing.assert_close(alone[0], found[2], rtol=0, atol=1e-5)
    by_workers = view_features(flat(), source, torch.arange(3), settings, Workplace(CPU.device, workers=1))
    assert torch.equal(by_workers, found)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"1.png.*it was readable before"):
        view_features(flat(), source, torch.arange(3), settings, CPU)
