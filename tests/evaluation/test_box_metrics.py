"""Average precision against the public evaluation, and against loops written from the definitions."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvmr.data.scene_source import Scene
from mvmr.evaluation.box_matching import THRESHOLDS, Detections, Matches, Truth, match_image
from mvmr.evaluation.box_metrics import DetectionMetrics
from mvmr.evaluation.measured import with_intervals
from mvmr.types import UserError

CLASSES, SIDE = 3, 24
Image = tuple[Scene, Detections]


def some_images(count: int = 14, *, seed: int = 0, ties: bool = True) -> list[Image]:
    """Random boxes and their rectangles as masks; images without objects, without detections, without both."""
    generator = np.random.default_rng(seed)

    def boxes(n: int) -> np.ndarray:
        corner, size = generator.integers(0, 12, (n, 2)), generator.integers(3, 12, (n, 2))
        return np.concatenate([corner, corner + size], 1).astype(np.float32)

    def masks(of: np.ndarray) -> torch.Tensor:
        drawn = torch.zeros(len(of), SIDE, SIDE, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(drawn, of.astype(int), strict=True):
            mask[top:bottom, left:right] = True
            mask[:, left : left + 2 * (left % 2)] = False  # so that masks and boxes differ
        return drawn

    images = []
    for number in range(count):
        n = 0 if number % 7 == 3 else int(generator.integers(1, 6))
        true = boxes(n)
        labels, ignored = generator.integers(0, CLASSES - (number % 2), n), generator.random(n) < 0.25
        near = true[generator.integers(0, n, 2 * n)] + generator.integers(-1, 2, (2 * n, 4)) if n else true
        found = np.concatenate([np.clip(near, 0, SIDE), boxes(3)]).astype(np.float32)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        guessed = np.concatenate(
            [np.repeat(labels, 2)[generator.permutation(2 * n)], generator.integers(0, CLASSES, 3)]
        )
        if number % 7 in (4, 3):
            found, guessed = found[:0] if number % 7 == 4 else found, guessed[:0] if number % 7 == 4 else guessed
        scores = generator.random(len(found))
        scores = np.round(scores, 1) if ties else scores
        images.append((
            Scene(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), torch.from_numpy(true), torch.from_numpy(labels),
                  masks(true), torch.from_numpy(ignored), f"{number}"),
            Detections(torch.from_numpy(found), torch.tensor(scores, dtype=torch.float32),
                       torch.from_numpy(guessed).long(), masks(found)),
        ))  # fmt: skip
    return images


def overlap(first: Any, second: Any, crowd: bool) -> float:
    """Of two boxes as lists or two masks, pixel by pixel for masks."""
    if isinstance(first, list):
        width = min(first[2], second[2]) - max(first[0], second[0])
        height = min(first[3], second[3]) - max(first[1], second[1])
        common = max(width, 0) * max(height, 0)
        sizes = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    else:
        common, sizes = int((first & second).sum()), [int(first.sum()), int(second.sum())]
    whole = sizes[0] if crowd else sum(sizes) - common
    return common / whole if whole else 0.0


def curve_value(marks: list[tuple[float, int]], objects: int, recalls: np.ndarray) -> float:
    """From (score, 1 right, 0 wrong) in the order of equal scores: mean of the best precision from each recall on."""
    right, points = 0, []
    for place, (_, mark) in enumerate(sorted(marks, key=lambda pair: -pair[0]), 1):
        right += mark
        points.append((right / objects, right / place))
    return float(np.mean([max((p for r, p in points if r >= recall), default=0.0) for recall in recalls]))


def coco_by_loops(images: list[Image], threshold: float, kind: str) -> float:
    values = []
    for label in range(CLASSES):
        marks: list[tuple[float, int]] = []
        objects = 0
        for scene, found in images:
            shapes = scene.boxes.tolist() if kind == "box" else list(scene.masks)
            theirs = [
                (shape, bool(crowd))
                for shape, crowd, own in zip(shapes, scene.ignored, scene.labels, strict=True) if own == label
            ]  # fmt: skip
            theirs = [pair for pair in theirs if not pair[1]] + [pair for pair in theirs if pair[1]]
            objects += sum(not crowd for _, crowd in theirs)
            taken: set[int] = set()
            shapes = found.boxes.tolist() if kind == "box" else list(found.masks)
            ours = [
                (float(s), shape)
                for s, shape, own in zip(found.scores, shapes, found.labels, strict=True)
                if own == label
            ]
            for score, shape in sorted(ours, key=lambda pair: -pair[0]):
                best, at = min(threshold, 1 - 1e-10), -1
                for number, (other, crowd) in enumerate(theirs):
                    if number in taken and not crowd:
                        continue
                    if at >= 0 and not theirs[at][1] and crowd:
                        break
                    value = overlap(shape, other, crowd)
                    if value >= best:
                        best, at = value, number
                if at >= 0 and theirs[at][1]:
                    continue
                taken |= {at} if at >= 0 else set()
                marks.append((score, int(at >= 0)))
        if objects:
            values.append(curve_value(marks, objects, np.linspace(0, 1, 101)))
    return 100 * float(np.mean(values))


def voc_by_loops(images: list[Image], threshold: float) -> float:
    values = []
    for label in range(CLASSES):
        every = sorted(
            ((float(score), number, box) for number, (_, found) in enumerate(images)
             for score, box, own in zip(found.scores, found.boxes.tolist(), found.labels, strict=True) if own == label),
            key=lambda triple: -triple[0],
        )  # fmt: skip
        objects = sum(int(((s.labels == label) & ~s.ignored).sum()) for s, _ in images)
        taken: set[tuple[int, int]] = set()
        marks = []
        for score, number, box in every:
            scene = images[number][0]
            overlaps = [
                (overlap(box, other, False), -k)
                for k, (other, own) in enumerate(zip(scene.boxes.tolist(), scene.labels, strict=True)) if own == label
            ]  # fmt: skip
            best, at = max(overlaps, default=(0.0, 0))
            if best > threshold and scene.ignored[-at]:
                continue
            marks.append((score, int(best > threshold and (number, at) not in taken)))
            if best > threshold:
                taken.add((number, at))
        if objects:
            values.append(curve_value(marks, objects, np.arange(0, 1.1, 0.1)))
    return 100 * float(np.mean(values))


def measured(images: list[Image], *, masks: bool = False) -> DetectionMetrics:
    metrics = DetectionMetrics(CLASSES, masks=masks, voc07=not masks)
    for scene, found in images:
        metrics.update(scene, found)
    return metrics


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_coco_three_ways(kind: str, seed: int) -> None:
    """Our matching, faster-coco-eval and a plain loop; with crowds, ties, and images without this or that."""
    images = some_images(seed=seed)
    metrics = measured(images, masks=True)
    computed, own = metrics.compute(), metrics.matches()[kind]
    for name, rows in (("ap50", [0]), ("ap75", [5]), ("ap", range(10))):
        expected = np.mean([coco_by_loops(images, THRESHOLDS[row], kind) for row in rows])
        assert own.mean(None, list(rows)) == pytest.approx(expected, abs=1e-6)
        assert computed[f"{kind}_{name}"] / 100 == pytest.approx(expected / 100, abs=1e-6)  # float32 inside
        assert 2 < expected < 95
        assert computed[f"box_{name}"] != computed[f"mask_{name}"]
        assert computed.statistics[f"{kind}_{name}"](torch.arange(len(images))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_voc_is_the_loop(seed: int) -> None:
    images = some_images(seed=seed)
    computed = measured(images).compute()
    expected = [voc_by_loops(images, threshold) for threshold in THRESHOLDS]
    assert computed["ap50_voc07"] == pytest.approx(expected[0], abs=1e-9)
    assert computed["ap75_voc07"] == pytest.approx(expected[5], abs=1e-9)
    assert computed["ap_voc07"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert computed["ap50_voc07"] != computed["ap50"]


def test_many_detections_and_recalls_that_meet_their_points() -> None:
    """Of 150 detections of a class COCO looks at 100; 10 objects, so that recall is 0.1, 0.2, ... exactly."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.arange(10.0)[:, None] * torch.tensor([[20.0, 0.0]])
    boxes = torch.cat([corner, corner + 10], 1)
    labels, none = torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.bool)
    scene = Scene(torch.zeros(3, 8, 8, dtype=torch.uint8), boxes, labels, None, none, "a")
    found = Detections(boxes.repeat(15, 1), torch.rand(150, generator=generator), torch.zeros(150, dtype=torch.int64))
    metrics = measured([(scene, found)])
    own = metrics.matches()["box"]
    assert sum(len(outcomes[1][0]) for outcomes in own._by_class) == 100
    assert own.mean() == pytest.approx(metrics.compute()["ap"], abs=1e-4)
    assert own.mean() == pytest.approx(np.mean([coco_by_loops([(scene, cut(found))], t, "box") for t in THRESHOLDS]))


def cut(found: Detections) -> Detections:
    first = found.scores.argsort(descending=True)[:100]
    return Detections(found.boxes[first], found.scores[first], found.labels[first])


def test_an_image_that_is_drawn_twice_counts_twice() -> None:
    images = some_images(ties=False)
    own = measured(images).matches()
    index = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 7, 7, 8, 8, 8, 12])
    repeated = [images[i] for i in index.tolist()]
    for kind, rule in (("box", "coco"), ("voc07", "voc")):
        again = [match_image(Truth(s.boxes, s.labels, s.ignored), f, classes=CLASSES, rule=rule) for s, f in repeated]
        expected = Matches(again, rule=rule).average_precision()
        np.testing.assert_allclose(own[kind].average_precision(index), expected, atol=1e-9)
        assert not np.allclose(own[kind].average_precision(), expected)
        np.testing.assert_array_equal(own[kind].average_precision(index, [5]), expected[5:6])


def test_a_class_that_a_resample_lacks_keeps_its_value() -> None:
    images = some_images(ties=False)
    lacking = torch.tensor([i for i, (scene, _) in enumerate(images) if 0 not in scene.labels[~scene.ignored]])
    assert len(lacking) > 1
    for kind, own in measured(images).matches().items():
        whole, part = own.average_precision(), own.average_precision(lacking)
        assert np.isnan(part[:, 0]).all(), kind
        part[:, 0] = whole[:, 0]
        assert own.mean(lacking) == pytest.approx(part.mean())
        assert own.mean(lacking, slice(5, 6)) == pytest.approx(part[5].mean())
        assert own.mean(torch.arange(len(images))) == pytest.approx(whole.mean())


def test_intervals_hold_the_value_and_are_told() -> None:
    computed = measured(some_images(40, ties=False)).compute()
    found = with_intervals(computed.also(n_train=3.0))
    for name in ("ap", "ap50", "ap75", "ap50_voc07"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert "n_train_low" not in found


def test_perfect_and_empty() -> None:
    images = [(s, Detections(s.boxes, torch.ones(len(s.boxes)), s.labels, s.masks)) for s, _ in some_images()]
    assert {round(value, 9) for value in measured(images, masks=True).compute().values()} == {100.0}
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64),
                       torch.zeros(0, SIDE, SIDE, dtype=torch.bool))  # fmt: skip
    assert set(measured([(s, empty) for s, _ in images], masks=True).compute().values()) == {0.0}
    without = [
        (Scene(s.image, s.boxes, s.labels, s.masks, torch.ones_like(s.ignored), s.name), empty) for s, _ in images
    ]
    with pytest.raises(UserError, match="no object that counts"):
        measured(without).compute()


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'mvmr\[detection\]'"):
        DetectionMetrics(2)


def test_nothing_is_written_to_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    measured(some_images(4), masks=True).compute()
    assert capsys.readouterr().out == ""
