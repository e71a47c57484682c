"""mvmr list: what there is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What can be listed."""

    methods = "methods"
    data = "data"
    recipes = "recipes"
    representations = "representations"
    views = "views"
    evaluations = "evaluations"


def list_names(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """List methods, data sets, recipes, representations, view recipes or evaluations, a line each."""
    from mvmr.cli.screen import show_json, show_table

    rows = entries(kind.value)
    if as_json:
        show_json({kind.value: rows})
    else:
        show_table(kind.value, ["name", "what it is"], [[name, text] for name, text in rows.items()])


def entries(kind: str) -> dict[str, str]:
    """{name: one line}."""
    if kind == "methods":
        from mvmr.methods import METHODS

        return {name: method.summary for name, method in METHODS.items()}
    if kind == "data":
        from mvmr.data.datasets import DATASETS

        return {name: data.description for name, data in DATASETS.items()}
    if kind == "representations":
        from mvmr.representations import REPRESENTATIONS

        return {name: _first_line(representation) for name, representation in REPRESENTATIONS.items()}
    if kind == "views":
        from mvmr.data.views import VIEW_RECIPES

        return {name: f"views: {', '.join(views)}" for name, views in VIEW_RECIPES.items()}
    if kind == "evaluations":
        from mvmr.evaluation import EVALUATIONS

        return {name: evaluation.description for name, evaluation in EVALUATIONS.items()}
    return _recipes()


def _recipes() -> dict[str, str]:
    from importlib import resources

    from mvmr.config import recipe_names
    from mvmr.protocols import FOLDER, protocol_names

    folder = resources.files("mvmr.recipes")
    files = {name: folder / f"{name}.yaml" for name in recipe_names()}
    files |= {name: folder / FOLDER / f"{name}.yaml" for name in protocol_names()}
    return {name: file.read_text().splitlines()[0].lstrip("# ").strip() for name, file in files.items()}


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
