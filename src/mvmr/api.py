"""The commands as functions: train, evaluate, embed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from mvmr.config import load
from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig, ImageSource, open_source
from mvmr.engine.train import CONFIG
from mvmr.engine.train import train as train_run
from mvmr.errors import UserError
from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.features import features_of
from mvmr.nets.weights import Encoder, load_encoder, random_encoder
from mvmr.types import Features, Result


def train(
    recipe: str | Path, *, out: str | Path | None = None, resume: bool = False, quiet: bool = False, **overrides: Any
) -> Path:
    """Train a recipe (a shipped one's name or a YAML file); returns the run folder.

    Overrides are keys of the recipe: `schedule={"epochs": 5}` or `**{"schedule.epochs": 5}`.
    """
    run = load(recipe, flat(overrides))
    folder = Path(out) if out is not None else default_folder(recipe, run.name)
    return train_run(run, folder, resume=resume, quiet=quiet)


def default_folder(recipe: str | Path, name: str) -> Path:
    """runs/NAME, or the folder of a run's own config.yaml."""
    path = Path(recipe)
    return path.parent if path.name == CONFIG and path.is_file() else Path("runs") / name


def evaluate(
    encoder: str | Path | Encoder,
    *,
    data: str | None = None,
    root: str | Path | None = None,
    on: Sequence[str] = ("knn",),
    settings: Mapping[str, Any] | None = None,
    random: bool = False,
) -> list[Result]:
    """Evaluate a frozen encoder: train on the training split's features, measure on the test split's.

    encoder: a run folder, an encoder.safetensors, timm:NAME, torchvision:NAME, or a loaded Encoder.
    data: a name of DATASETS; by default what the run was trained on. on: names of EVALUATIONS.
    settings: of the evaluations, for example {"linear_fast.labels_per_class": 10, "knn.k": 5}.
    random: also evaluate the same net with random weights, named "random".
    Results of a run folder are also written to its results/EVALUATION-DATA.json. Raises UserError.
    """
    _check_evaluations(on)
    loaded = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    config = data_config(encoder, data, root)
    configs = {name: _settings_of(name, settings or {}) for name in on}
    encoders = {str(encoder) if not isinstance(encoder, Encoder) else "encoder": loaded}
    if random:
        encoders["random"] = random_encoder(loaded.card, seed=0)
    sources = {split: open_source(config, split, size=loaded.card.image_size) for split in ("train", "test")}
    results = []
    for name, net in encoders.items():
        started = time.monotonic()
        parts = {split: _features(net, source, config) for split, source in sources.items()}
        extraction = time.monotonic() - started
        for kind, chosen in configs.items():
            started = time.monotonic()
            metrics = EVALUATIONS[kind].function(parts["train"], parts["test"], chosen)
            seconds = extraction + time.monotonic() - started
            results.append(Result(kind, config.name, "test", metrics, chosen.model_dump(mode="json"), name, seconds))
    if not isinstance(encoder, Encoder) and Path(encoder).is_dir():
        for result in results:
            _write_result(Path(encoder), result)
    return results


def embed(
    encoder: str | Path | Encoder,
    *,
    data: str | None = None,
    root: str | Path | None = None,
    split: Literal["pretrain", "train", "test"] = "pretrain",
    out: str | Path | None = None,
) -> Features:
    """Features [N, D] of every image of a split; `out` (.npz) gets features, labels, classes and file names."""
    if out is not None and Path(out).suffix != ".npz":
        raise UserError(f"--out {out}: features are written as .npz; give a name that ends in .npz")
    loaded = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    config = data_config(encoder, data, root)
    source = open_source(config, split, size=loaded.card.image_size)
    features = _features(loaded, source, config)
    if out is not None:
        _write_features(Path(out), features, source)
    return features


def data_config(encoder: str | Path | Encoder, data: str | None, root: str | Path | None) -> DataConfig:
    """The data section to evaluate on: the run's own, or the named data set's."""
    own: dict[str, Any] = {}
    if not isinstance(encoder, Encoder):
        folder = Path(encoder) if Path(encoder).is_dir() else Path(encoder).parent
        if (folder / CONFIG).is_file():
            own = yaml.safe_load((folder / CONFIG).read_text()).get("data", {})
    if data is None and not own:
        raise UserError(f"--data is missing: name the data set to use, one of {', '.join(sorted(DATASETS))}")
    if data is not None and data not in DATASETS:
        raise UserError(f"--data {data}: no such data set; known: {', '.join(sorted(DATASETS))}")
    if data is not None and own.get("name") != data:
        own = {"name": data}
    # `limit` shortens pretraining, not what an evaluation is measured on.
    changed = {**own, "limit": None, **({"root": str(root)} if root is not None else {})}
    return DataConfig.model_validate(changed)


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; an empty mapping stays a value."""
    pairs: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = value
    return pairs


def _features(encoder: Encoder, source: ImageSource, config: DataConfig) -> Features:
    return features_of(encoder, source, workers=config.workers, device=device())


def _check_evaluations(on: Iterable[str]) -> None:
    unknown = [name for name in on if name not in EVALUATIONS]
    if unknown:
        raise UserError(f"--on {','.join(unknown)}: no such evaluation; known: {', '.join(sorted(EVALUATIONS))}")


def _settings_of(evaluation: str, settings: Mapping[str, Any]) -> Any:
    """One evaluation's settings out of {"knn.k": 5, ...}."""
    from pydantic import ValidationError

    given = {key.partition(".")[2]: value for key, value in settings.items() if key.partition(".")[0] == evaluation}
    foreign = [key for key in settings if key.partition(".")[0] not in EVALUATIONS]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: settings are written EVALUATION.key=value, for example knn.k=5")
    try:
        return EVALUATIONS[evaluation].config.model_validate(given)
    except ValidationError as error:
        known = ", ".join(sorted(EVALUATIONS[evaluation].config.model_fields))
        problems = "; ".join(f"{evaluation}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{problems} (known settings: {known})") from None


def _write_result(folder: Path, result: Result) -> None:
    suffix = "-random" if result.encoder == "random" else ""
    path = folder / "results" / f"{result.evaluation}-{result.data}{suffix}.json"
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result.__dict__, indent=2) + "\n")
    os.replace(beside, path)


def _write_features(path: Path, features: Features, source: ImageSource) -> None:
    import numpy as np

    arrays: dict[str, Any] = {"features": features.x.cpu().numpy()}
    if features.y is not None:
        arrays |= {"labels": features.y.cpu().numpy(), "classes": np.array(features.classes)}
    if source.paths is not None:
        arrays["files"] = np.array([str(path) for path in source.paths])
    beside = path.with_suffix(".part.npz")
    np.savez(beside, **arrays)
    os.replace(beside, path)
