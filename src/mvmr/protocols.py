"""Evaluation recipes: which data, which evaluations and which settings, under one name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mvmr.data.datasets import DATASETS
from mvmr.data.sources import DataConfig
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
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{recipe}: no YAML file ({error})") from None
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


def data_section(
    own: Mapping[str, Any], proposed: Mapping[str, Any], *, data: str | None, root: str | Path | None
) -> DataConfig | None:
    """The data to evaluate on: named by `data`, else by a recipe's `proposed` section, else by the run's `own`.

    What the run and then the recipe say of that data set holds, and so does what a recipe says without a name; sections
    of other data sets do not. None where nothing names one. Raises UserError for unknown names, keys and values.
    """
    if data is not None and data not in DATASETS:
        raise UserError(f"--data {data}: no such data set; known: {', '.join(sorted(DATASETS))}")
    name = data or proposed.get("name") or own.get("name")
    if name is None:
        return None
    # `limit` shortens pretraining, not what an evaluation is measured on.
    section = {**own, "limit": None} if own.get("name") == name else {"name": name}
    section |= {**proposed, "limit": None} if proposed.get("name", name) == name else {}
    if root is not None:
        section["root"] = str(root)
    try:
        return DataConfig.model_validate(section)
    except ValidationError as error:
        problems = "; ".join(f"data.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{problems}; mend the data section of the recipe or of the run's config.yaml") from None
