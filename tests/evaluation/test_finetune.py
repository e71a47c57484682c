"""Fine-tuning changes a copy, trains what its settings say, and leaves files that repeat its numbers."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.short_finetuning import CPU, digits, same, state, tiny, tuned
from mvmr.data.images import ArraySource, FileSource, subset
from mvmr.data.label_subsets import stratified
from mvmr.data.loading import Loader
from mvmr.data.store import prepare
from mvmr.data.views import PadCrop, View, ViewMaker, Views, view_settings
from mvmr.evaluation import Workplace
from mvmr.evaluation.features import features_of
from mvmr.evaluation.finetune import FinetuneConfig, finetune, parameter_groups
from mvmr.evaluation.head import HeadConfig, head, load_head
from mvmr.nets.weights import load_encoder


def test_it_learns_from_few_labels_and_leaves_the_encoder_alone() -> None:
    encoder = tiny()
    encoder.backbone.layer1.train()  # a mode of its own, to be found again
    before, flags = state(encoder), [part.training for part in encoder.modules()]
    random_state = torch.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    place = Workplace(CPU.device, progress=lambda *report: seen.append(report))
    config = FinetuneConfig(fraction=0.3, epochs=6, batch_size=32, encoder_lr=1e-2, flip=False)
    metrics = finetune(encoder, digits("train"), digits("test"), config, place)
    assert metrics.keys() == {"top1", "top5", "n_train"}
    assert metrics["n_train"] == 389
    assert metrics["top1"] > 60  # chance is 10; three seeds gave 81 to 86
    assert metrics["top1"] < metrics["top5"]
    assert same(state(encoder), before)
    assert [part.training for part in encoder.modules()] == flags
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert seen == [("fine-tuning", step, 72) for step in range(1, 73)]


def test_it_is_the_loop_that_one_would_write(tmp_path: Path) -> None:
    """The same weights, bit for bit, as torch's own Adam and cosine over the same batches."""
    encoder, train = tiny(), digits("train")
    weights, _ = tuned(tmp_path, encoder, head_lr=5e-2, weight_decay=0.1, label_smoothing=0.1, seed=3)
    net = copy.deepcopy(encoder.backbone).train().to(memory_format=torch.channels_last)
    layer = nn.utils.skip_init(nn.Linear, 64, 10)
    layer.load_state_dict({"weight": torch.zeros(10, 64), "bias": torch.zeros(10)})
    few = subset(train, stratified(train.labels, 0.1, seed=3))
    shifted = Views(recipe="mvmr_cifar", size=16, crops={"augmented": View(crop=None, pad_crop=PadCrop(padding=2))})
    views = ViewMaker(shifted, mean=(0.3,) * 3, std=(0.4,) * 3, seed=3)
    loader = Loader(few, batch_size=32, seed=3)
    optimizer = torch.optim.Adam(
        [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1), "lr": lr}
         for part, lr in ((net, 1e-2), (layer, 5e-2)) for p in part.parameters()]
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * len(loader))
    for epoch in range(2):
        for batch in loader:
            images = views(batch.images, batch.index, epoch)["global"][0]
            features = net(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(layer(features), few.labels[batch.index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    expected = state(net) | {"head.weight": layer.weight.detach(), "head.bias": layer.bias.detach()}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():  # torch computes its cosine step by step, with a rounding error at each
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    first, metrics = tuned(tmp_path / "a")
    torch.manual_seed(99)
    again, repeated = tuned(tmp_path / "b")
    assert same(first, again)
    assert metrics == repeated
    assert (tmp_path / "a/encoder.safetensors").read_bytes() == (tmp_path / "b/encoder.safetensors").read_bytes()
    assert not same(first, tuned(tmp_path / "c", seed=1)[0])


def test_the_saved_files_repeat_the_result(tmp_path: Path) -> None:
    _, metrics = tuned(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.card.method == "mvmr finetuned"
    assert encoder.card.data == "digits"
    assert load_head(tmp_path).classes == tuple("0123456789")
    test = features_of(encoder, digits("test"))
    assert head(test, test, HeadConfig(folder=tmp_path)) == {key: metrics[key] for key in ("top1", "top5")}
    other = tuned(tmp_path / "other", tiny(data="cifar10"))
    assert load_encoder(tmp_path / "other").card.data == "cifar10, digits"
    assert other[1]["n_train"] == 130


def test_a_frozen_encoder_stays_as_it_is(tmp_path: Path) -> None:
    encoder = tiny()
    weights, metrics = tuned(tmp_path, encoder, freeze_encoder=True, head_lr=0.05)
    assert same(state(load_encoder(tmp_path).backbone), state(encoder.backbone))
    assert weights["head.weight"].abs().sum() > 0
    assert metrics["n_train"] == 130
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    before = state(tiny().backbone)
    for freeze in (True, False):
        weights, _ = tuned(tmp_path, freeze_batch_norm=freeze)
        kept = {name: torch.equal(weights[name], value) for name, value in before.items()}
        assert all(kept[name] is freeze for name in before if "running" in name or "num_batches" in name)
        assert not any(kept[name] for name in before if name.endswith(("weight", "bias")))


def test_rates_follow_the_depth() -> None:
    encoder, layer = tiny("timm:vit_tiny_patch16_224", dim=192), nn.Linear(192, 10)
    config = FinetuneConfig(encoder_lr=0.1, head_lr=3.0, layer_decay=0.5, weight_decay=0.2)
    groups = parameter_groups(encoder.backbone, layer, config)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(encoder.backbone.named_parameters())
    assert rates.keys() == {id(p) for p in (*named.values(), *layer.parameters())}
    assert rates[id(layer.weight)] == rates[id(layer.bias)] == 3.0
    assert rates[id(named["norm.weight"])] == pytest.approx(0.1)
    for block in range(12):
        assert rates[id(named[f"blocks.{block}.mlp.fc1.weight"])] == pytest.approx(0.1 * 0.5 ** (12 - block))
    assert rates[id(named["patch_embed.proj.weight"])] == pytest.approx(0.1 * 0.5**13)
    assert decays[id(named["blocks.0.mlp.fc1.weight"])] == decays[id(layer.weight)] == 0.2
    assert decays[id(named["blocks.0.mlp.fc1.bias"])] == decays[id(layer.bias)] == 0.0
    flat = parameter_groups(encoder.backbone, layer, FinetuneConfig(encoder_lr=0.1))
    assert {group["lr"] for group in flat} == {0.1}  # the head's too


def test_layer_decay_shortens_the_steps_of_early_layers(tmp_path: Path) -> None:
    before = state(tiny().backbone)
    few = {"epochs": 2, "batch_size": 130, "encoder_lr": 1e-3, "head_lr": 1e-2, "freeze_batch_norm": True}
    whole, parts = tuned(tmp_path, **few)[0], tuned(tmp_path, layer_decay=0.5, **few)[0]
    # The head is zero at the first step, so the encoder takes one: of Adam's, as long as the rate. Eight blocks.
    for depth, name in ((0, "conv1.weight"), (1, "layer1.0.conv1.weight"), (8, "layer4.1.conv2.weight")):
        moved, less = ((after[name] - before[name]).abs().mean() for after in (whole, parts))
        assert less / moved == pytest.approx(0.5 ** (8 - depth), rel=0.02)


def test_files_and_arrays_are_trained_on_alike(tmp_path: Path) -> None:
    digit, paths = digits("train"), []
    for number in range(60):
        image = digit.read(number).permute(1, 2, 0).numpy()
        path = Path("train") / str(int(digit.labels[number])) / f"{number}.png"
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / path)
        paths.append(os.fspath(path))
    names = tuple("0123456789")
    files = FileSource(tmp_path, paths, digit.labels[:60], name="own/train", classes=names)
    (tmp_path / "few.txt").write_text("".join(f"{number}.png\n" for number in range(40)))
    config = FinetuneConfig(subset_list=tmp_path / "few.txt", epochs=2, batch_size=16, encoder_lr=1e-2)
    results = {}
    for kind, source, workers in [
        ("files", files, 0),
        ("workers", files, 2),
        ("memory", ArraySource(digit.images[:60], digit.labels[:60], name="own/train", classes=names, paths=paths), 0),
        ("mapped", prepare(files, size=8, cache=tmp_path / "cache"), 0),
    ]:
        place = Workplace(CPU.device, workers=workers, out=tmp_path / kind)
        results[kind] = finetune(tiny(), source, digits("test"), config, place)
        assert results[kind]["n_train"] == 40
    weights = {kind: state(load_encoder(tmp_path / kind).backbone) for kind in results}
    assert same(weights["files"], weights["workers"])
    assert same(weights["memory"], weights["mapped"])
    # Padded crops of files are rounded to bytes once more than those of arrays.
    assert not same(weights["files"], state(tiny().backbone))


def test_the_views_that_are_trained_on() -> None:
    small, large = FinetuneConfig().view_settings(32), FinetuneConfig().view_settings(96)
    assert small == view_settings("mvmr_cifar", size=32)
    ((_, view),) = large.crops.items()
    assert view.crop is not None
    assert view.crop.scale == (0.08, 1.0)
    assert (view.flip, view.jitter, view.gray, view.blur, view.count) == (0.5, None, 0.0, None, 1)
    ((_, view),) = FinetuneConfig().view_settings(16).crops.items()
    assert view.pad_crop == PadCrop(padding=2)
    for views in (None, "byol"):
        ((_, unmirrored),) = FinetuneConfig(flip=False, views=views).view_settings(16).crops.items()
        ((_, mirrored),) = FinetuneConfig(views=views).view_settings(16).crops.items()
        assert unmirrored == mirrored.model_copy(update={"flip": 0.0})
    many = FinetuneConfig(views="multicrop").view_settings(64)
    ((name, view),) = many.crops.items()
    assert (name, view.count, view.stream) == ("global", 1, "global")
    assert view.jitter == view_settings("multicrop", size=64).crops["global"].jitter


def test_a_transformer_with_dropped_paths_repeats() -> None:
    encoder = tiny("timm:test_vit", image_size=160, dim=64)
    for block in encoder.backbone.blocks:
        block.attn.proj_drop.p = 0.5
    train, test = digits("train").take(torch.arange(20)), digits("test").take(torch.arange(20))
    config = FinetuneConfig(epochs=1, batch_size=10, encoder_lr=1e-2, layer_decay=0.7)
    first = finetune(encoder, train, test, config, CPU)
    torch.manual_seed(7)
    assert finetune(encoder, train, test, config, CPU) == first


@pytest.mark.gpu
def test_on_a_gpu_in_half_precision(tmp_path: Path) -> None:
    place = Workplace(torch.device("cuda"), out=tmp_path)
    encoder = tiny()
    before = state(encoder)
    config = FinetuneConfig(fraction=0.3, epochs=6, batch_size=32, encoder_lr=1e-2, flip=False)
    assert finetune(encoder, digits("train"), digits("test"), config, place)["top1"] > 50
    assert same(state(encoder), before)
    assert load_encoder(tmp_path).backbone.conv1.weight.dtype == torch.float32
