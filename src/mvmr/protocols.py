"""Evaluation recipes: which data, which evaluations and which settings, under one name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mvmr.errors import UserError, nearest
from mvmr.types import Section

FOLDER = "evaluation"
"""Where, among the shipped recipes, those of evaluations lie."""


class Protocol(Section):
    """What `mvmr evaluate --recipe` reads."""

    evaluations: tuple[str, ...] = ("knn",)
    """Names of EVALUATIONS."""
    data: dict[str, Any] = {}
    """The data section, as in a training recipe."""
    settings: dict[str, dict[str, Any]] = {}
    """{evaluation: its settings}."""


def protocol_names() -> list[str]:
    """Names of the evaluation recipes shipped with the package."""
    files = (resources.files("mvmr.recipes") / FOLDER).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_protocol(recipe: str | Path) -> Protocol:
    """The evaluation recipe of that name, or in that YAML file. Raises UserError."""
    names = protocol_names()
    if str(recipe) in names:
        text = (resources.files("mvmr.recipes") / FOLDER / f"{recipe}.yaml").read_text()
    elif Path(recipe).is_file():
        text = Path(recipe).read_text()
    else:
        raise UserError(
            f"--recipe {recipe}: no evaluation recipe of that name and no YAML file{nearest(str(recipe), names)}; "
            f"evaluation recipes: {', '.join(names)}"
        )
    try:
        return Protocol.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: not valid YAML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        known = ", ".join(Protocol.model_fields)
        raise UserError(f"{recipe}: {problems}; an evaluation recipe has the keys {known}") from None
