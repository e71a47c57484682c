"""Evaluations by name, and their settings out of {"knn.k": 5, ...}: checked, and their mistakes told by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mvmr.errors import UserError
from mvmr.evaluation import EVALUATIONS


def check_evaluations(on: Iterable[str]) -> None:
    """Raises UserError for a name that EVALUATIONS lacks."""
    unknown = [name for name in on if name not in EVALUATIONS]
    if unknown:
        raise UserError(f"--on {','.join(unknown)}: no such evaluation; known: {', '.join(sorted(EVALUATIONS))}")


def checked_settings(given: Mapping[str, Any], proposed: Mapping[str, Any], on: Iterable[str]) -> dict[str, Any]:
    """What is `given` over what a recipe has `proposed`, both as {"knn.k": 5, ...}.

    Raises UserError for keys of no evaluation, and for given ones of evaluations that are not `on`: they would have no
    effect. A recipe may say more than is asked for.
    """
    wanted = {
        key: value for key, value in {**proposed, **given}.items() if "." in key or value != {}
    }  # {} sets nothing
    foreign = [key for key in wanted if _owner(key) not in EVALUATIONS]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: settings are written EVALUATION.key=value, for example knn.k=5")
    idle = [key for key in wanted if key in given and _owner(key) not in on]
    if idle:
        names = ",".join(dict.fromkeys(map(_owner, idle)))
        raise UserError(
            f"{', '.join(idle)}: no effect, because {names} is not asked for; add it to --on, or leave it out"
        )
    return wanted


def settings_of(evaluation: str, settings: Mapping[str, Any], *, folder: Path | None) -> Any:
    """One evaluation's out of all settings; `folder` is the run's, for those that have it. Raises UserError."""
    config = EVALUATIONS[evaluation].config
    place = {"folder": folder} if folder is not None and "folder" in config.model_fields else {}
    given = {key.partition(".")[2]: value for key, value in settings.items() if _owner(key) == evaluation}
    try:
        return config.model_validate({**place, **given})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join((evaluation, *(str(part) for part in each['loc'] if part != '')))}: {each['msg']}"
            for each in error.errors()
        )
        raise UserError(f"{problems} (known settings: {', '.join(sorted(config.model_fields))})") from None


def _owner(key: str) -> str:
    return key.partition(".")[0]
