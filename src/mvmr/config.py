"""Run: every setting of a run, read from a recipe and overrides, and written back resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, create_model, field_validator, model_validator

from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig
from mvmr.data.views import Views
from mvmr.errors import UserError, nearest
from mvmr.methods import METHODS, MethodConfig
from mvmr.nets.encoders import EncoderConfig
from mvmr.representations import resolve_settings
from mvmr.representations.cache import CacheConfig
from mvmr.sections import EngineConfig, OnlineConfig, OptimizerConfig, ScheduleConfig
from mvmr.types import Section

__all__ = [
    "EngineConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "Run",
    "ScheduleConfig",
    "load",
    "pairs",
    "parse",
    "recipe_names",
]


class Run(Section):
    """Every setting of a run."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    """Name of the run; its folder is runs/NAME unless given."""
    seed: int = Field(0, ge=0)
    """Seed of the weights, the order of images, and every view."""
    method: SerializeAsAny[MethodConfig]
    """The method and its settings."""
    data: DataConfig = DataConfig()
    """The images."""
    views: Views
    """What is cropped and changed."""
    representations: dict[str, dict[str, Any]] = {}
    """Fixed maps of the plain image by name, each with its settings."""
    cache: CacheConfig = CacheConfig()
    """What is kept of them, computed once; `cache: off` computes them at every step."""
    encoder: EncoderConfig = EncoderConfig()
    """The network that is kept."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Length and learning-rate curve."""
    engine: EngineConfig = EngineConfig()
    """Where and how it is computed."""
    online: OnlineConfig = OnlineConfig()
    """What is watched."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null_representations(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("representations"), Mapping):
            kept = {name: settings for name, settings in given["representations"].items() if settings is not None}
            return {**given, "representations": kept}
        return given

    @field_validator("cache", mode="before")
    @classmethod
    def _switch(cls, given: Any) -> Any:
        # YAML reads a bare `off` as false.
        switches = {False: {"enabled": False}, True: {}, "off": {"enabled": False}, "on": {}}
        return switches.get(given, given) if isinstance(given, bool | str) else given

    @model_validator(mode="after")
    def _fill_normalisation(self) -> Run:
        known = DATASETS[self.data.name]
        filled = {"mean": self.data.mean or known.mean, "std": self.data.std or known.std}
        object.__setattr__(self, "data", self.data.model_copy(update=filled))
        return self

    @model_validator(mode="after")
    def _resolve_representations(self) -> Run:
        defaults = self.method.representation_defaults()
        merged = {name: {**defaults.get(name, {}), **given} for name, given in self.representations.items()}
        object.__setattr__(self, "representations", resolve_settings(merged))
        self.method.check_representations(merged)
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> Run:
        self.method.check_views(self.views.counts())
        self.method.check_batch(self.data.batch_size)
        return self

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain mappings, ready for YAML."""
        return self.model_dump(mode="json")

    @property
    def peak_lr(self) -> float:
        if self.optimizer.lr == "auto":
            return METHODS[self.method.name].base_lr * self.data.batch_size / 256
        return self.optimizer.lr


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    files = resources.files("mvmr.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load(recipe: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Run:
    """The run that a recipe's name or a YAML file and `key.sub=value` overrides describe.

    Raises UserError with every mistake at once: its key, the nearest right key, and the remedy.
    """
    settings = _read(recipe)
    for key, value in pairs(overrides):
        _put(settings, key, value)
    return parse(settings, where=str(recipe))


def parse(settings: Mapping[str, Any], *, where: str = "settings") -> Run:
    """The run that a mapping of settings describes."""
    method = settings.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    if name not in METHODS:
        raise UserError(f"{where}: method.name is {name!r}; known methods: {_listed(METHODS)}{nearest(name, METHODS)}")
    full = {**settings, "method": method if isinstance(method, Mapping) else {"name": name}}
    if not isinstance(full.get("views"), Mapping):
        raise UserError(f"{where}: `views` is missing; it needs at least `recipe` and `size`")
    try:
        return _run_model(name).model_validate(full)
    except ValidationError as error:
        raise UserError(_explained(error, _run_model(name), where)) from None


@cache
def _run_model(method: str) -> type[Run]:
    # One concrete class a method, so that a mistake in its section is reported with its full key.
    return create_model("Run", __base__=Run, method=(METHODS[method].Config, ...))


def _read(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (resources.files("mvmr.recipes") / f"{recipe}.yaml").read_text()
    elif path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file or a recipe's name") from None
    else:
        names = recipe_names()
        raise UserError(
            f"{recipe}: no recipe of that name and no YAML file{nearest(str(recipe), names)}; recipes: {_listed(names)}"
        )
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{recipe}: a recipe is a mapping of sections (method, data, views, ...), this is not one")
    return settings


def pairs(overrides: Iterable[str] | Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(key, value) of every override; values written as text are read as YAML."""
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r}: an override is written key.sub=value, for example schedule.epochs=50")
        try:
            yield key, yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{text!r}: the value is not valid YAML; put quotes around it") from None


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = settings.get(section)
        if isinstance(inner, str) and section == "method":  # `method: mvmr` is short for `method: {name: mvmr}`
            inner = {"name": inner}
        settings[section] = settings = dict(inner) if isinstance(inner, Mapping) else {}
    settings[last] = value


def _explained(error: ValidationError, model: type[Section], where: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, problem["loc"][:-1])
            lines.append(f"{key}: no such key{nearest(str(problem['loc'][-1]), known)}; known here: {_listed(known)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] in ("missing", "value_error") else f" (given: {problem['input']!r})"
            lines.append(f"{key}: {message}{given}" if key else message)
    many = f"{where}: {len(lines)} mistakes\n  " if len(lines) > 1 else f"{where}: "
    return many + "\n  ".join(lines)


def _known_keys(model: type[Section], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((a for a in candidates if isinstance(a, type) and issubclass(a, Section)), None)
        if inner is not None:
            model = inner
    return sorted(model.model_fields)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
