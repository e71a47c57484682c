"""The commands as functions: train, tune, evaluate, embed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from mvmr.config import load
from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig, ImageSource, Progress, open_source
from mvmr.engine.checkpoints import FOLDER as CHECKPOINTS
from mvmr.engine.train import CONFIG
from mvmr.engine.train import train as train_run
from mvmr.engine.tune import Tuned
from mvmr.engine.tune import save as save_tuned
from mvmr.engine.tune import tune as tune_run
from mvmr.errors import UserError
from mvmr.evaluation import EVALUATIONS
from mvmr.evaluation.baselines import PREFIX as BASELINE
from mvmr.evaluation.baselines import baseline_encoder
from mvmr.evaluation.cached_features import cached_features
from mvmr.evaluation.session import Session
from mvmr.nets.released import ReleasedInput
from mvmr.nets.weights import Encoder, load_encoder, random_encoder
from mvmr.protocols import Protocol, load_protocol
from mvmr.types import Features, Result

EncoderLike = str | Path | Encoder
"""A run folder, an encoder.safetensors, a released checkpoint, timm:NAME, torchvision:NAME, or a loaded Encoder."""


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
    encoder: EncoderLike | Sequence[EncoderLike],
    *,
    data: str | None = None,
    root: str | Path | None = None,
    on: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    random: bool = False,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    keep_features: bool = True,
    progress: Progress | None = None,
) -> list[Result]:
    """Evaluate encoders: train on the training split, measure on the test split; the encoders stay as they are.

    encoder: one or several, each a run folder, an encoder.safetensors, a released checkpoint, timm:NAME,
    torchvision:NAME, representation:NAME for a fixed map of the image, or a loaded Encoder;
    `mvmr.evaluation.comparison.compare` tells their results apart. data: a name of DATASETS; by default the recipe's,
    or what the first run was trained on. on: names of EVALUATIONS; by default the recipe's, or knn. settings: of the
    evaluations, as {"knn.k": 5}. random: also evaluate the first one's net with random weights, named "random".
    recipe: an evaluation recipe, a shipped one's name or a YAML file; what else is given comes on top. out: folder for
    results and trained networks, one in it for each encoder; by default a run's own, and none for other encoders.
    resume: take finished results of the same encoder, images and settings from there. keep_features: in the cache
    folder, where they are looked up next time. progress: called as (what, done, total).
    Accuracies have 95 % confidence intervals beside them, NAME_low and NAME_high. Raises UserError and RunError.
    """
    protocol = load_protocol(recipe) if recipe is not None else Protocol()
    on = tuple(on) or protocol.evaluations
    _check_evaluations(on)
    given = [encoder] if isinstance(encoder, str | Path | Encoder) else list(encoder)
    if not given:
        raise UserError("there is no encoder to evaluate; give one or several")
    wanted = {**flat(protocol.settings), **flat(settings or {})}
    wanted = {key: value for key, value in wanted.items() if "." in key or value != {}}  # {"knn": {}} sets nothing
    # All are opened before the first is worked on: the last one's mistake should not cost the others' time.
    jobs = []
    for name, one in zip(_names(given, random), given, strict=True):
        own = _folder_of(one)
        configs = {kind: _settings_of(kind, wanted, folder=own) for kind in on}
        jobs.append((name, _loaded(one, data or protocol.data.get("name")), own, configs))
    if random:
        _, first, own, configs = jobs[0]
        if first.card.encoder.name.startswith(BASELINE):
            raise UserError(f"--random: {jobs[0][0]} has no weights to draw; name a network first")
        jobs.append(("random", random_encoder(first.card, seed=0), own, configs))
    config = data_config(given[0], data, root, protocol.data)
    results: list[Result] = []
    sources: dict[tuple[str, int], ImageSource] = {}
    for name, loaded, own, configs in jobs:
        session = Session(
            data=config, evaluations=configs, device=device(), resume=resume, keep_features=keep_features,
            progress=progress, sources=sources,
        )  # fmt: skip
        if out is None:
            results += session.results(loaded, name, own, suffix="-random" if name == "random" else "")
        else:
            results += session.results(loaded, name, Path(out) / _as_folder(name))
    return results


def _names(encoders: Sequence[EncoderLike], random: bool) -> list[str]:
    """What each is called in results. Raises UserError where two are called the same."""
    loaded = [one for one in encoders if isinstance(one, Encoder)]
    names = [str(one) for one in encoders if not isinstance(one, Encoder)]
    numbers = iter(range(1, len(loaded) + 1))
    named = [
        str(one) if not isinstance(one, Encoder) else "encoder" if len(loaded) == 1 else f"encoder {next(numbers)}"
        for one in encoders
    ]
    twice = sorted({name for name in named if named.count(name) > 1} | ({"random"} & set(names) if random else set()))
    if twice:
        raise UserError(f"{', '.join(twice)}: given twice, so that results could not be told apart; give each once")
    return named


def _as_folder(name: str) -> str:
    """A name that a folder can have: runs/a -> runs-a."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "encoder"


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
    features = cached_features(loaded, source, folder=config.cache, workers=config.workers, device=device())
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
    if folder is not None and folder.name == CHECKPOINTS:  # an epoch's encoder, in its run's folder
        folder = folder.parent
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
    if str(encoder).startswith(BASELINE):
        if known is None:
            raise UserError(f"--data is missing: {encoder} takes the images' size and normalisation from the data set")
        return baseline_encoder(str(encoder), size=known.size or 224, mean=known.mean, std=known.std)
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
