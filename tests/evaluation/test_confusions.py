"""Confusion matrices and mean IoU against torchmetrics and a loop over pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.segmentation import mean_iou as torchmetrics_iou

from mvmr.evaluation.confusions import class_ious, confusion, mean_iou, pixel_accuracy, segmentation_metrics
from mvmr.evaluation.intervals import statistic_interval
from mvmr.types import UserError


def some_maps(images: int = 6, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions and labels [M, 9, 11]; the last class is nowhere, the one before it predicted only."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 2, (images, 9, 11), generator=generator)
    noise = torch.randint(0, classes - 1, labels.shape, generator=generator)
    predicted = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, noise)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return predicted, labels


def slow_miou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    inside, union = [0] * classes, [0] * classes
    for p, t in zip(predicted.reshape(-1).tolist(), labels.reshape(-1).tolist(), strict=True):
        if t == 255:
            continue
        for number in range(classes):
            inside[number] += p == number and t == number
            union[number] += p == number or t == number
    parts = [100 * i / u for i, u in zip(inside, union, strict=True) if u]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_is_torchmetrics_and_the_definition(seed: int) -> None:
    predicted, labels = some_maps(seed=seed)
    matrix = confusion(predicted, labels, 7)
    assert matrix.shape == (7, 7)
    assert int(matrix.sum()) == int((labels != 255).sum())
    assert mean_iou(matrix) == pytest.approx(slow_miou(predicted, labels, 7), abs=1e-9)
    as_torchmetrics = multiclass_jaccard_index(predicted, labels, 7, average=None, ignore_index=255).double()
    somewhere = class_ious(matrix).isfinite()
    assert somewhere.tolist() == [True] * 6 + [False]
    torch.testing.assert_close(class_ious(matrix)[somewhere], 100 * as_torchmetrics[somewhere], rtol=0, atol=1e-4)
    macro = multiclass_jaccard_index(predicted, labels, 7, average="macro", ignore_index=255)
    assert mean_iou(matrix) == pytest.approx(100 * float(macro), abs=1e-4)  # float32 there
    known = labels != 255
    one_hot = [torch.nn.functional.one_hot(each[known], 7).T[None] for each in (predicted, labels)]
    each = torchmetrics_iou(*one_hot, num_classes=7, per_class=True).double()[0]
    assert mean_iou(matrix) == pytest.approx(float(100 * each[somewhere].mean()), abs=1e-4)
    assert pixel_accuracy(matrix) == pytest.approx(100 * float((predicted == labels)[known].double().mean()), abs=1e-9)


def test_known_limits() -> None:
    _, labels = some_maps()
    perfect = labels.where(labels != 255, 0)
    assert mean_iou(confusion(perfect, labels, 7)) == 100.0
    assert mean_iou(confusion(torch.full_like(labels, 6), labels, 7)) == 0.0
    half = confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2)
    assert half.tolist() == [[1, 1], [1, 1]]
    assert mean_iou(half) == pytest.approx(100 / 3)


def test_names_of_the_classes_change_nothing() -> None:
    predicted, labels = some_maps()
    order = torch.randperm(7)
    renamed = torch.where(labels == 255, 255, order[labels.clamp_max(6)])
    assert mean_iou(confusion(order[predicted], renamed, 7)) == pytest.approx(mean_iou(confusion(predicted, labels, 7)))


def test_rare_classes_do_not_push_the_interval_up() -> None:
    # Twenty classes, each in one image and never found, beside a background that always is: resamples lack a third.
    matrices = torch.zeros(20, 21, 21, dtype=torch.int64)
    for number in range(20):
        matrices[number, 0, 0] = 90
        matrices[number, number + 1, 0] = 10
    found = segmentation_metrics(matrices, tuple(map(str, range(21))))
    assert found["miou"] == pytest.approx(90 / 21)
    assert found["miou_low"] == pytest.approx(found["miou"])
    assert found["miou_high"] == pytest.approx(found["miou"])


def test_the_interval_is_over_images() -> None:
    predicted, labels = some_maps(12)
    predicted[:4] = labels[:4].where(labels[:4] != 255, 0)
    matrices = torch.stack([confusion(p, t, 7) for p, t in zip(predicted, labels, strict=True)])
    names = tuple("abcdefg")
    found = segmentation_metrics(matrices.to(torch.int32), names)
    assert found["miou"] == pytest.approx(slow_miou(predicted, labels, 7), abs=1e-9)

    def by_definition(index: Tensor) -> float:
        here, everywhere = class_ious(matrices[index].sum(0)), class_ious(matrices.sum(0))
        ious = [h if h == h else e for h, e in zip(here.tolist(), everywhere.tolist(), strict=True) if e == e]
        return sum(ious) / len(ious)

    expected = statistic_interval(by_definition, 12, kind="centred", resamples=2000)
    assert found["miou_low"] == pytest.approx(expected.low, abs=1e-9)
    assert found["miou_high"] == pytest.approx(expected.high, abs=1e-9)
    assert found["miou_low"] < found["miou"] < found["miou_high"]
    assert sorted(key for key in found if "/" in key) == [f"iou/{name}" for name in "abcdef"]  # g is nowhere
    assert found["iou/f"] == 0.0
    whole = torch.arange(12)
    assert {name: each(whole) for name, each in found.statistics.items()} == pytest.approx(
        {"miou": found["miou"], "pixel_accuracy": found["pixel_accuracy"]}
    )
    assert found.images == 12
    assert "miou_low" not in segmentation_metrics(matrices[:1], names)
    with pytest.raises(UserError, match="no pixel of the test split has a label"):
        segmentation_metrics(torch.zeros(2, 3, 3), ("a", "b", "c"))
