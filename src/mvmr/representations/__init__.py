"""Fixed maps of the plain image, [B, 3, H, W] to [B, F]: what MV-MR ties the embedding to, each usable alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model
from torch import nn

from mvmr.errors import UserError, nearest
from mvmr.representations.augmented import AugmentedPixels
from mvmr.representations.base import Representation
from mvmr.representations.hog import HOG
from mvmr.representations.local_std import LocalStd
from mvmr.representations.pixels import Pixels
from mvmr.representations.scattering import Scattering
from mvmr.representations.teacher import PYTHON, Given, Teacher, from_python, joined
from mvmr.types import IMAGENET_MEAN, IMAGENET_STD, Section

__all__ = [
    "HOG",
    "REPRESENTATIONS",
    "AugmentedPixels",
    "LocalStd",
    "Pixels",
    "Representation",
    "Scattering",
    "Teacher",
    "build_representations",
    "resolve_settings",
    "settings_model",
]

REPRESENTATIONS: dict[str, type[Representation]] = {
    "pixels": Pixels,
    "augmented_pixels": AugmentedPixels,
    "scattering": Scattering,
    "hog": HOG,
    "local_std": LocalStd,
    "teacher": Teacher,
}

FILLED_BY_CALLER = ("mean", "std", "seed")
"""Settings that a run knows better than a constructor's default: used where the user gives none."""


def build_representations(
    settings: Mapping[str, Mapping[str, Any]],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int = 0,
    teachers: Mapping[str, Given] | None = None,
) -> nn.ModuleDict:
    """The representations of a run, by the names used in logs and weights: {name: {"kind": ..., setting: value}}.

    kind is a key of REPRESENTATIONS, by default the name itself; the settings are those of its constructor. mean, std
    and seed are the run's, for constructors that take them and settings that do not name them. teachers: modules,
    functions or `Teacher`s given from Python, by name; settings may name them too, as {"kind": "teacher", "model":
    "python"}, and then say how they are used.
    Raises UserError that lists every unknown kind, unknown setting and wrong value.
    """
    run = {"mean": tuple(mean), "std": tuple(std), "seed": seed}
    objects = teachers or {}
    built = nn.ModuleDict()
    for name, (kind, given) in _checked(joined(settings, objects)).items():
        values = {key: getattr(given, key) for key in type(given).model_fields}
        values |= {key: run[key] for key in FILLED_BY_CALLER if key in values and key not in given.model_fields_set}
        try:
            here = name in objects and values.get("model") == PYTHON
            made = from_python(objects[name], values) if here else kind(**values)
            made.settings = values
            built[name] = made
        except UserError as error:
            raise UserError(f"representations.{name}: {error}") from error
    return built


def resolve_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same settings with the constructors' defaults filled in, as plain values for YAML.

    mean, std and seed stay out where they are not given, so that `build_representations` still takes the run's.
    Raises UserError as that does.
    """
    resolved = {}
    for name, (_, given) in _checked(settings).items():
        left_out = {key for key in FILLED_BY_CALLER if key not in given.model_fields_set}
        kind = {"kind": settings[name]["kind"]} if "kind" in settings[name] else {}
        resolved[name] = {**kind, **given.model_dump(mode="json", exclude=left_out)}
    return resolved


@functools.cache
def settings_model(kind: type[Representation]) -> type[Section]:
    """The constructor's signature as a closed pydantic model: the one definition of names, types and defaults."""
    hints = get_type_hints(kind.__init__)
    named = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in named}
    return create_model(f"{kind.__name__}Settings", __base__=Section, **fields)


def _checked(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[type[Representation], Section]]:
    """Class and checked settings of every representation; all mistakes are told at once."""
    checked: dict[str, tuple[type[Representation], Section]] = {}
    wrong: list[str] = []
    for name, given in settings.items():
        where = f"representations.{name}"
        if not isinstance(given, Mapping):
            wrong.append(f"{where}: must be a mapping of settings ({{}} for the defaults), not {given!r}")
            continue
        kind = given.get("kind", name)
        if kind not in REPRESENTATIONS:
            advice = "" if "kind" in given else "; under a name of your own, say which it is with `kind`"
            wrong.append(f"{where}{'.kind' if 'kind' in given else ''}: no representation {kind!r}"
                         f"{nearest(kind, REPRESENTATIONS)}; known: {', '.join(REPRESENTATIONS)}{advice}")  # fmt: skip
            continue
        if "." in name or hasattr(nn.ModuleDict(), name):
            wrong.append(f"{where}: cannot be a name (no dots, and no word of Python's dictionaries); choose another")
        try:
            model = settings_model(REPRESENTATIONS[kind])
            checked[name] = REPRESENTATIONS[kind], model.model_validate({k: v for k, v in given.items() if k != "kind"})
        except ValidationError as error:
            wrong += [_told(where, problem, model) for problem in error.errors()]
    if wrong:
        raise UserError("\n".join(wrong))
    return checked


def _told(where: str, problem: Any, model: type[Section]) -> str:
    """One mistake that pydantic found, with its key and the remedy."""
    key, *inner = problem["loc"]
    if problem["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields) or "none"
        return f"{where}.{key}: no such setting{nearest(key, model.model_fields)}; known: {known}"
    if problem["type"] == "missing":
        example = ", for example timm:vit_base_patch16_224" if key == "model" else ""
        return f"{where}.{key}: must be given{example}"
    place = "".join(f"[{part}]" for part in inner)
    return f"{where}.{key}{place}: {problem['msg']}, not {problem['input']!r}"
