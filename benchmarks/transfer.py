"""What pretrained encoders bring to detection and segmentation, at a size that one core trains in minutes.

    python benchmarks/transfer.py ENCODER... --voc ROOT --coco ROOT --out DIR [--seeds 0,1,2] [--iterations 300]

ENCODER: a run folder, an encoder.safetensors, or `random`: the architecture of the first other one with fresh weights,
drawn by each run's seed. Each is trained with every seed, on

- `detection`: voc07 under --voc, Faster R-CNN with the C4 head (or --head fpn);
- `instance`: train2017 under --coco, cut into 70 images to train on and the rest to measure on by `mvmr splits`, Mask
  R-CNN with a pyramid;
- `semantic`: the same images, FCN on the backbone as it is.

Images have a shorter side of 128 pixels, four make a step, the detector's widths are cut, and objects of all classes
count as one class (else --all-classes: 70 images hardly teach 20 or 80): nothing here compares with a published
number, only the rows with each other. Writes OUT/transfer.json: for each task and encoder every seed's loss
in the first and last tenth of the training and its average precisions, their means, and the difference to `random`
with its 95 % interval: test images are resampled, for both encoders alike, under the mean over seeds. It does not hold
what other seeds would bring; the seeds' own values show that. Prints the table as Markdown. What was finished is kept
in OUT/cells, and a training that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvmr.data.coco_splits import write_splits
from mvmr.data.sources import DataConfig
from mvmr.engine.environment import environment
from mvmr.evaluation import EVALUATIONS, Workplace
from mvmr.evaluation.detection import DetectionConfig, detection
from mvmr.evaluation.instance import InstanceConfig, instance
from mvmr.evaluation.intervals import resampled
from mvmr.evaluation.measured import Metrics
from mvmr.evaluation.resume import forget
from mvmr.evaluation.semantic import SemanticConfig, semantic
from mvmr.nets.cards import Encoder
from mvmr.nets.weights import load_encoder, random_encoder
from mvmr.ops.files import write_bytes
from mvmr.representations.teacher import digest

RANDOM = "random"
RESAMPLES = 1000
TRAINING = 70
"""Images of COCO128 that are trained on."""
SIZES: dict[str, Any] = {
    "batch_size": 4, "lr": 0.01, "warmup": 30, "train_sizes": (112, 128), "min_size": 128, "max_size": 160,
    "anchors_per_image": 128, "precise_batch_norm": 10, "score_threshold": 0.01,
}  # fmt: skip
C4: dict[str, Any] = {"head": "c4", "regions_per_image": 32, "proposals": 100}
FPN: dict[str, Any] = {
    "head": "fpn", "levels": (2, 3, 4), "pyramid_width": 64, "hidden": 256, "regions_per_image": 64, "proposals": 200,
}  # fmt: skip
LABEL_MAPS: dict[str, Any] = {
    "batch_size": 4, "crop": 128, "short_side": 128, "lr": 0.02, "dilation": "none", "head_dilation": 1,
    "head_channels": 64,
}  # fmt: skip
MASKS: dict[str, Any] = {"mask_layers": (64, 64), "drops": (3 / 4, 11 / 12)}


def settings(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a task, but for the seed and files."""
    if task == "semantic":
        return {**LABEL_MAPS, "iterations": arguments.iterations}
    common = {**SIZES, "iterations": arguments.iterations, "one_class": not arguments.all_classes}
    own = {"detection": C4 if arguments.head == "c4" else FPN, "instance": {**FPN, **MASKS}}
    return {**common, **own.get(task, {})}


def job(task: str, arguments: argparse.Namespace, seed: int) -> tuple[DataConfig, Any]:
    """The data and the settings of one training; writes the splits that it needs."""
    own = {**settings(task, arguments), "seed": seed}
    if task == "detection":
        return DataConfig(name="voc07", root=arguments.voc), DetectionConfig(**own)
    annotations, splits = arguments.coco / "annotations" / "instances_train2017.json", arguments.out / "splits"
    if task == "semantic" and not arguments.all_classes:
        annotations = one_category(annotations, splits / "objects_train2017.json")
    train, test = write_splits(annotations, size=TRAINING, count=1, seed=0, rest=True, out=splits)
    config = {"instance": InstanceConfig, "semantic": SemanticConfig}[task]
    return DataConfig(name="coco", root=arguments.coco), config(**own, train_annotations=train, test_annotations=test)


def one_category(annotations: Path, out: Path) -> Path:
    """The same objects, all of one category, so that every pixel is background or object."""
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": 1, "name": "object"}]
    for each in content["annotations"]:
        each["category_id"] = 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content))
    return out


TASKS: dict[str, Callable[..., Metrics]] = {"detection": detection, "instance": instance, "semantic": semantic}


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cells = {
        (task, name, seed): cell(task, name, seed, arguments)
        for task in arguments.on for seed in arguments.seeds for name in arguments.encoders
    }  # fmt: skip
    rows = [
        row(task, name, [cells[task, name, seed] for seed in arguments.seeds],
            [cells[task, RANDOM, seed] for seed in arguments.seeds] if RANDOM in arguments.encoders else None)
        for task in arguments.on for name in arguments.encoders
    ]  # fmt: skip
    record = {
        "rows": rows, "seeds": arguments.seeds, "iterations": arguments.iterations,
        "settings": {task: settings(task, arguments) for task in arguments.on}, "environment": environment(),
    }  # fmt: skip
    (arguments.out / "transfer.json").write_text(json.dumps(record, indent=2) + "\n")
    for task in arguments.on:
        print(f"\n{table([one for one in rows if one['task'] == task])}")


def cell(task: str, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training's metrics, and those of each resample of the test images; read where it was finished before."""
    label = Path(name).parent.name if name.endswith(".safetensors") else Path(name).name
    if name == RANDOM:
        encoder = random_encoder(load_encoder(next(e for e in arguments.encoders if e != RANDOM)).card, seed=seed)
    else:
        encoder = load_encoder(name)
    data, config = job(task, arguments, seed)
    file = arguments.out / "cells" / f"{task}-{label}-seed{seed}-{key(task, encoder, data, config)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    workplace = Workplace(torch.device("cpu"), out=arguments.out / "training" / file.stem)
    metrics = TASKS[task](encoder, data, config, workplace)
    found = {"encoder": label, "metrics": dict(metrics), "resampled": resampled_metrics(metrics)}
    write_bytes(file, json.dumps(found).encode(), remedy="make room on the disk")
    forget(arguments.out / "training" / file.stem)
    print(task, label, f"seed {seed}", {key: round(value, 2) for key, value in metrics.items()}, flush=True)
    return found


def key(task: str, encoder: Encoder, data: DataConfig, config: Any) -> str:
    """Eight digits that tell a cell from every other: net, images with their objects, settings and resamples."""
    fingerprints = EVALUATIONS[task].fingerprints
    assert fingerprints is not None
    parts = [
        task, digest(encoder), encoder.card.model_dump(mode="json"), dict(fingerprints(data, config)), RESAMPLES,
        config.model_dump(mode="json", exclude={"train_annotations", "test_annotations"}),  # their content is in
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def resampled_metrics(metrics: Metrics) -> dict[str, list[float]]:
    """{metric: its values on resamples of the test images}, on the same resamples for all encoders."""
    functions = {
        **{name: lambda index, each=each: float(each[index].mean()) for name, each in metrics.outcomes.items()},
        **metrics.statistics,
    }
    images = metrics.images or max((len(each) for each in metrics.outcomes.values()), default=0)
    index = torch.cat(list(resampled(images, RESAMPLES, 0))) if functions else torch.empty(0, 0)
    return {name: [float(function(row)) for row in index] for name, function in functions.items()}


def row(task: str, name: str, own: list[dict], random: list[dict] | None) -> dict[str, Any]:
    """Means over seeds, every seed's values, and the differences to `random`."""
    found: dict[str, Any] = {"task": task, "encoder": own[0]["encoder"], "of_seeds": [one["metrics"] for one in own]}
    found["mean"] = {key: float(np.mean([one["metrics"][key] for one in own])) for key in own[0]["metrics"]}
    if random is None or name == RANDOM:
        return found
    found["ahead"] = {}
    for key in own[0]["resampled"]:
        differences = [np.mean([one["resampled"][key] for one in each], axis=0) for each in (own, random)]
        low, high = np.quantile(differences[0] - differences[1], [0.025, 0.975]).tolist()
        seeds = [a["metrics"][key] - b["metrics"][key] for a, b in zip(own, random, strict=True)]
        found["ahead"][key] = {"mean": float(np.mean(seeds)), "low": low, "high": high, "of_seeds": seeds}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: losses and average precisions, means over seeds, and below 50 % overlap the difference to `random`."""
    names = [name for name in rows[0]["mean"] if not name.endswith(("_low", "_high")) and name != "n_train"]
    shown = next((name for name in ("ap50", "mask_ap50", "miou") if name in names), names[-1])
    lines = [
        f"| {rows[0]['task']} | " + " | ".join(names) + f" | {shown} over random (95 %) |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for one in rows:
        ahead = one.get("ahead", {}).get(shown)
        told = "" if ahead is None else f"{ahead['mean']:+.2f} ({ahead['low']:+.2f} to {ahead['high']:+.2f})"
        lines.append(
            f"| {one['encoder']} | " + " | ".join(f"{one['mean'][name]:.2f}" for name in names) + f" | {told} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", nargs="+", metavar="ENCODER")
    parser.add_argument("--voc", type=Path, help="folder with VOCdevkit")
    parser.add_argument("--coco", type=Path, help="folder with train2017 and annotations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--on", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--head", choices=["c4", "fpn"], default="c4", help="of detection")
    parser.add_argument("--all-classes", action="store_true", help="keep the data sets' classes")
    parser.add_argument("--iterations", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
