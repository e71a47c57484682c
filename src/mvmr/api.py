"""The commands as functions: train, tune, evaluate, embed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from mvmr.config import load
from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig, ImageSource, Progress, open_source
from mvmr.engine.train import CONFIG
from mvmr.engine.train import train as train_run
from mvmr.engine.tune import Tuned
from mvmr.engine.tune import save as save_tuned
from mvmr.engine.tune import tune as tune_run
from mvmr.errors import UserError
from mvmr.evaluation import EVALUATIONS, Workplace
from mvmr.evaluation.features import features_of
from mvmr.nets.released import ReleasedInput
from mvmr.nets.weights import Encoder, load_encoder, random_encoder
from mvmr.protocols import Protocol, load_protocol
from mvmr.types import Features, Result


def train(
    recipe: str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    teachers: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Train a recipe (a shipped one's name or a YAML file); returns the run folder.

    teachers: frozen networks to distil by name, each an nn.Module or any function of images [B, 3, S, S]; they join
    the recipe's representations. Overrides are keys of the recipe: `schedule={"epochs": 5}` or
    `**{"schedule.epochs": 5}`. Raises UserError and RunError.
    """
    given = {f"representations.{name}": {"kind": "teacher", "model": "python"} for name in teachers or {}}
    run = load(recipe, {**given, **flat(overrides)})
    folder = Path(out) if out is not None else default_folder(recipe, run.name)
    return train_run(run, folder, resume=resume, quiet=quiet, teachers=teachers)


def tune(
    recipe: str | Path,
    *,
    batch_size: bool = True,
    lr: bool = True,
    max_batch_size: int | None = None,
    out: str | Path | None = None,
    **overrides: Any,
) -> Tuned:
    """Search a batch size and a learning rate for a recipe; `out` (.yaml) gets it resolved, and its curves beside it.

    The result's `run` has the numbers in place, its `record` says how they were found. Raises UserError and RunError.
    """
    tuned = tune_run(load(recipe, flat(overrides)), batch_size=batch_size, lr=lr, max_batch_size=max_batch_size)
    if out is not None:
        save_tuned(tuned, Path(out))
    return tuned


def default_folder(recipe: str | Path, name: str) -> Path:
    """runs/NAME, or the folder of a run's own config.yaml."""
    path = Path(recipe)
    return path.parent if path.name == CONFIG and path.is_file() else Path("runs") / name


def evaluate(
    encoder: str | Path | Encoder,
    *,
    data: str | None = None,
    root: str | Path | None = None,
    on: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    random: bool = False,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Evaluate an encoder: train on the training split, measure on the test split; the encoder stays as it is.

    encoder: a run folder, an encoder.safetensors, a released checkpoint, timm:NAME, torchvision:NAME, or a loaded
    Encoder. data: a name of DATASETS; by default the recipe's, or what the run was trained on. on: names of
    EVALUATIONS; by default the recipe's, or knn. settings: of the evaluations, as {"knn.k": 5}. random: also evaluate
    the same net with random weights, named "random". recipe: an evaluation recipe, a shipped one's name or a YAML file;
    what else is given comes on top. progress: called as (what, done, total). Results of a run folder are also written
    to its results/EVALUATION-DATA.json. Raises UserError.
    """
    protocol = load_protocol(recipe) if recipe is not None else Protocol()
    on = tuple(on) or protocol.evaluations
    _check_evaluations(on)
    given = {**flat(protocol.settings), **flat(settings or {})}
    configs = {name: _settings_of(name, given, folder=_folder_of(encoder)) for name in on}
    loaded = _loaded(encoder, data or protocol.data.get("name"))
    config = data_config(encoder, data, root, protocol.data)
    encoders = {str(encoder) if not isinstance(encoder, Encoder) else "encoder": loaded}
    if random:
        encoders["random"] = random_encoder(loaded.card, seed=0)
    sources = {split: open_source(config, split, size=loaded.card.image_size) for split in ("train", "test")}
    folder, results = _folder_of(encoder), []
    for name, net in encoders.items():
        out = folder if name != "random" else None
        for result in _evaluated(net, name, sources, configs, config, out, progress):
            results.append(result)
            if folder is not None:
                _write_result(folder, result)
    return results


def _evaluated(
    net: Encoder,
    name: str,
    sources: Mapping[str, ImageSource],
    configs: Mapping[str, Any],
    data: DataConfig,
    folder: Path | None,
    progress: Progress | None,
) -> Iterator[Result]:
    """One encoder's results; its features are extracted once, and only where an evaluation wants them."""
    extraction, parts = 0.0, {}
    if any(EVALUATIONS[kind].on == "features" for kind in configs):
        started = time.monotonic()
        parts = {split: _features(net, source, data, progress) for split, source in sources.items()}
        extraction = time.monotonic() - started
    for kind, chosen in configs.items():
        started, evaluation = time.monotonic(), EVALUATIONS[kind]
        if evaluation.on == "features":
            metrics = evaluation.function(parts["train"], parts["test"], chosen)
        else:
            out = None if folder is None else folder / f"{kind}-{data.name}"
            place = Workplace(device(), data.workers, out, progress)
            metrics = evaluation.function(net, sources["train"], sources["test"], chosen, place)
        seconds = time.monotonic() - started + (extraction if evaluation.on == "features" else 0.0)
        yield Result(kind, data.name, "test", metrics, chosen.model_dump(mode="json"), name, seconds)


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
    loaded = _loaded(encoder, data)
    config = data_config(encoder, data, root)
    source = open_source(config, split, size=loaded.card.image_size)
    features = _features(loaded, source, config)
    if out is not None:
        _write_features(Path(out), features, source)
    return features


def data_config(
    encoder: str | Path | Encoder,
    data: str | None,
    root: str | Path | None,
    proposed: Mapping[str, Any] | None = None,
) -> DataConfig:
    """The data section to evaluate on: the named data set's, else the `proposed` one, else the run's own."""
    folder = None if isinstance(encoder, Encoder) else _folder_of(encoder) or Path(encoder).parent
    own: dict[str, Any] = {}
    if folder is not None and (folder / CONFIG).is_file():
        own = yaml.safe_load((folder / CONFIG).read_text()).get("data", {})
    if proposed and data in (None, proposed.get("name")):
        # Of the run's own section, where the same data lie is still true.
        own = {**(own if own.get("name") == proposed.get("name") else {}), **proposed}
    if data is None and not own:
        raise UserError(f"--data is missing: name the data set to use, one of {', '.join(sorted(DATASETS))}")
    if data is not None and data not in DATASETS:
        raise UserError(f"--data {data}: no such data set; known: {', '.join(sorted(DATASETS))}")
    if data is not None and own.get("name") != data:
        own = {"name": data}
    # `limit` shortens pretraining, not what an evaluation is measured on.
    changed = {**own, "limit": None, **({"root": str(root)} if root is not None else {})}
    return DataConfig.model_validate(changed)


def _loaded(encoder: str | Path | Encoder, data: str | None) -> Encoder:
    """The encoder; a released checkpoint, which does not say what images it wants, gets the data set's constants."""
    if isinstance(encoder, Encoder):
        return encoder
    known = DATASETS.get(data or "")
    return load_encoder(encoder, released=ReleasedInput(known.size, known.mean, known.std) if known else None)


def _folder_of(encoder: str | Path | Encoder) -> Path | None:
    """The run folder that an encoder is given by, if it is."""
    return Path(encoder) if not isinstance(encoder, Encoder) and Path(encoder).is_dir() else None


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


def _features(encoder: Encoder, source: ImageSource, config: DataConfig, progress: Progress | None = None) -> Features:
    told = None if progress is None else partial(progress, f"features of {source.name}")
    return features_of(encoder, source, workers=config.workers, device=device(), progress=told)


def _check_evaluations(on: Iterable[str]) -> None:
    unknown = [name for name in on if name not in EVALUATIONS]
    if unknown:
        raise UserError(f"--on {','.join(unknown)}: no such evaluation; known: {', '.join(sorted(EVALUATIONS))}")


def _settings_of(evaluation: str, settings: Mapping[str, Any], *, folder: Path | None) -> Any:
    """One evaluation's settings out of {"knn.k": 5, ...}; `folder`, where it has that setting, is the run folder."""
    from pydantic import ValidationError

    place = {"folder": folder} if folder is not None and "folder" in EVALUATIONS[evaluation].config.model_fields else {}
    given = {key.partition(".")[2]: value for key, value in settings.items() if key.partition(".")[0] == evaluation}
    foreign = [key for key in settings if key.partition(".")[0] not in EVALUATIONS]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: settings are written EVALUATION.key=value, for example knn.k=5")
    try:
        return EVALUATIONS[evaluation].config.model_validate({**place, **given})
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
