"""The commands as functions: train, tune, evaluate, embed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from mvmr.evaluation.baselines import PREFIX as BASELINE
from mvmr.evaluation.baselines import baseline_encoder
from mvmr.evaluation.cached_features import cached_features
from mvmr.evaluation.features import write_features
from mvmr.evaluation.results import folders_of
from mvmr.evaluation.session import Session
from mvmr.evaluation.settings import check_evaluations, checked_settings, settings_of
from mvmr.nets.released import ReleasedInput
from mvmr.nets.weights import Encoder, load_encoder, random_encoder
from mvmr.protocols import Protocol, data_section, load_protocol
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
    torchvision:NAME, representation:NAME for a fixed map of the image, or a loaded Encoder, in results "encoder", or
    "encoder 1" and so on; `mvmr.evaluation.comparison.compare` tells their results apart. data: a name of DATASETS; by
    default the recipe's, or what the first run was trained on. on: names of EVALUATIONS; by default the recipe's, or
    knn. settings: of these evaluations, as {"knn.k": 5}. random: also evaluate the first network with random weights,
    named "random". recipe: an evaluation recipe, a shipped one's name or a YAML file; what else is given comes on top.
    out: folder for results and trained networks, one in it for each encoder; by default a run's own, and none for other
    encoders. resume: take finished results of the same encoder, images and settings from there. keep_features: in the
    cache folder, where they are looked up next time. What a loaded Encoder computes no key says for certain (hooks,
    methods put in its place): its features are never kept, and its results never taken up. progress: called as (what,
    done, total).
    Accuracies have 95 % confidence intervals beside them, NAME_low and NAME_high. Raises UserError and RunError.
    """
    protocol = load_protocol(recipe) if recipe is not None else Protocol()
    on = tuple(on) or protocol.evaluations
    check_evaluations(on)
    given = [encoder] if isinstance(encoder, str | Path | Encoder) else list(encoder)
    if not given:
        raise UserError("there is no encoder to evaluate; give one or several")
    names = _names(given, random)
    config = data_config(next((one for one in given if _own_data(one)), given[0]), data, root, protocol.data)
    wanted = checked_settings(flat(settings or {}), flat(protocol.settings), on)
    # All are opened before the first is worked on: the last one's mistake should not cost the others' time.
    jobs = [_job(name, one, config, on, wanted) for name, one in zip(names, given, strict=True)]
    if random:
        jobs.append(_random_job(jobs))
    if out is not None:
        folders = folders_of([job.name for job in jobs], Path(out))
        jobs = [replace(job, folder=folder, suffix="") for job, folder in zip(jobs, folders, strict=True)]
    results: list[Result] = []
    sources: dict[tuple[str, int], ImageSource] = {}
    for job in jobs:
        session = Session(
            data=config, evaluations=job.settings, device=device(), resume=resume,
            keep_features=keep_features, from_file=job.from_file, progress=progress, sources=sources,
        )  # fmt: skip
        results += session.results(job.encoder, job.name, job.folder, suffix=job.suffix)
    return results


@dataclass(frozen=True)
class _Job:
    """One encoder to evaluate."""

    name: str
    encoder: Encoder
    folder: Path | None
    """Of its results."""
    settings: dict[str, Any]
    suffix: str = ""
    """To the names of results, so that the random net's lie beside its run's."""
    from_file: bool = True
    """False of an object from Python, of which no key says for certain what it computes."""


def _job(name: str, given: EncoderLike, data: DataConfig, on: Sequence[str], wanted: Mapping[str, Any]) -> _Job:
    own = _folder_of(given)
    settings = {kind: settings_of(kind, wanted, folder=own) for kind in on}
    return _Job(name, open_encoder(given, data.name), own, settings, from_file=not isinstance(given, Encoder))


def _random_job(jobs: Sequence[_Job]) -> _Job:
    """The first network that is no fixed map, with random weights. Raises UserError where there is none."""
    for job in jobs:
        if not job.encoder.card.encoder.name.startswith(BASELINE):
            drawn = random_encoder(job.encoder.card, seed=0)
            return replace(job, name="random", encoder=drawn, suffix="-random", from_file=True)
    raise UserError(f"--random: {', '.join(job.name for job in jobs)} has no weights to draw; name a network too")


def _names(encoders: Sequence[EncoderLike], random: bool) -> list[str]:
    """What each is called in results. Raises UserError where two are the same or called the same."""
    numbers, count = iter(range(1, len(encoders) + 1)), sum(isinstance(one, Encoder) for one in encoders)
    named, meant = [], []
    for one in encoders:
        if isinstance(one, Encoder):
            named.append("encoder" if count == 1 else f"encoder {next(numbers)}")
            meant.append(named[-1])
        else:
            named.append(str(one))
            meant.append(str(Path(one).resolve()) if Path(one).exists() else str(one))  # a and ./a are one
    twice = {
        name
        for name, what in zip(named, meant, strict=True)
        if meant.count(what) > 1 or named.count(name) > 1 or (random and name == "random")
    }
    if twice:
        raise UserError(
            f"{', '.join(sorted(twice))}: given twice, so that results could not be told apart; give each once"
        )
    return named


def embed(
    encoder: EncoderLike,
    *,
    data: str | None = None,
    root: str | Path | None = None,
    split: Literal["pretrain", "train", "test"] = "pretrain",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features [N, D] of every image of a split; `out` (.npz) gets features, labels, classes and file names.

    Those of an encoder given by path or name are kept in the cache folder, as in `evaluate`. progress: called as (what,
    done, total). Raises UserError and RunError.
    """
    if out is not None and Path(out).suffix != ".npz":
        raise UserError(f"--out {out}: features are written as .npz; give a name that ends in .npz")
    config = data_config(encoder, data, root)
    loaded = open_encoder(encoder, config.name)
    source = open_source(config, split, size=loaded.card.image_size, progress=progress)
    features = cached_features(
        loaded, source, folder=config.cache, workers=config.workers, device=device(), progress=progress,
        keep=not isinstance(encoder, Encoder),
    )  # fmt: skip
    if out is not None:
        write_features(Path(out), features, source.paths)
    return features


def data_config(
    encoder: EncoderLike, data: str | None, root: str | Path | None, proposed: Mapping[str, Any] | None = None
) -> DataConfig:
    """The data section to evaluate on: the named data set's, else the `proposed` one, else the run's own."""
    config = data_section(_own_data(encoder), proposed or {}, data=data, root=root)
    if config is not None:
        return config
    if not isinstance(encoder, Encoder) and ":" not in str(encoder) and not Path(encoder).exists():
        load_encoder(encoder)  # says what is wrong with the path
    raise UserError(f"--data is missing: name the data set to use, one of {', '.join(sorted(DATASETS))}")


def _own_data(encoder: EncoderLike) -> Mapping[str, Any]:
    """The data section of the run that an encoder is from, if it lies in one."""
    if isinstance(encoder, Encoder):
        return {}
    folder = _folder_of(encoder) or Path(encoder).parent
    if folder.name == CHECKPOINTS:  # an epoch's encoder, in its run's folder
        folder = folder.parent
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not valid YAML ({error}); restore it, or move the encoder out of this folder"
        ) from None
    section = content.get("data") if isinstance(content, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def open_encoder(encoder: EncoderLike, data: str) -> Encoder:
    """The encoder that is given, or of that path or name, as `load_encoder` has it.

    A fixed map, or a released checkpoint, does not say what images it wants: it is given the constants of the data set
    `data`. Raises UserError.
    """
    if isinstance(encoder, Encoder):
        return encoder
    known = DATASETS[data]
    if str(encoder).startswith(BASELINE):
        return baseline_encoder(str(encoder), size=known.size or 224, mean=known.mean, std=known.std)
    return load_encoder(encoder, released=ReleasedInput(known.size, known.mean, known.std))


def _folder_of(encoder: EncoderLike) -> Path | None:
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
