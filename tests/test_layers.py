"""Imports run one way. What may import what is written here once, and read from the sources, functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# Low to high: a module imports what stands above it here, and its own group. The longest prefix decides.
LAYERS: list[tuple[str, ...]] = [
    ("mvmr.errors", "mvmr.recipes", "mvmr.__version__"),  # the version is a constant, not a module
    ("mvmr.types",),
    ("mvmr.ops",),
    ("mvmr.losses",),
    ("mvmr.nets", "mvmr.data"),
    ("mvmr.representations",),
    ("mvmr.data.module",),
    ("mvmr.methods",),
    ("mvmr.sections",),
    ("mvmr.config", "mvmr.protocols"),
    ("mvmr.engine",),
    ("mvmr.api",),
    ("mvmr",),
    ("mvmr.cli",),
    ("mvmr.__main__",),
]
RANKS = {group: rank for rank, groups in enumerate(LAYERS) for group in groups}

# Beside the layers: measuring and reporting know images and encoders, not what trained them.
ASIDE = ("mvmr.evaluation", "mvmr.report")
ASIDE_MAY_IMPORT = (
    "mvmr.__version__",
    "mvmr.errors",
    "mvmr.types",
    "mvmr.ops",
    "mvmr.losses",
    "mvmr.nets",
    "mvmr.data",
    "mvmr.representations",
)
MAY_IMPORT_ASIDE = ("mvmr.config", "mvmr.engine", "mvmr.api", "mvmr", "mvmr.cli")

# Third parties that are slow to import: inside functions only, but for the engine's own.
LATE = {"lightning", "matplotlib", "open_clip", "plotly", "scipy", "sklearn", "tensorboard", "timm"}
LIGHTNING_FILES = ("mvmr.engine", "mvmr.data.module")


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    late: bool
    """Inside a function, so run when that is called."""
    typing: bool
    """Under `if TYPE_CHECKING`, so never run."""
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((SOURCE / "mvmr").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(source: str, importer: str, known: set[str], *, package: bool = False) -> list[Import]:
    """Every import of one module's source, each resolved to the longest module name that is known."""
    found: list[Import] = []

    def resolved(base: str, name: str) -> str:
        return f"{base}.{name}" if f"{base}.{name}" in known else base

    def visit(node: ast.AST, late: bool, typing: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = importer.split(".") if package else importer.split(".")[:-1]
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            names = [resolved(base, alias.name) for alias in node.names]
        found.extend(Import(importer, name, late, typing, node.lineno) for name in dict.fromkeys(names))
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, inside, True)
            for child in node.orelse:
                visit(child, inside, typing)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typing)

    visit(ast.parse(source), False, False)
    return found


@cache
def imports() -> list[Import]:
    known = {*modules(), "mvmr.__version__"}
    return [
        found
        for name, path in modules().items()
        for found in imports_in(path.read_text(), name, known, package=path.name == "__init__.py")
    ]


def within(name: str, groups: tuple[str, ...] | set[str]) -> bool:
    # "mvmr" means the package's own file and not all that is in it.
    return any(name == group or (group != "mvmr" and name.startswith(f"{group}.")) for group in groups)


def group_of(name: str) -> str:
    matching = [group for group in (*RANKS, *ASIDE) if within(name, (group,))]
    assert matching, f"{name} is in no layer: give it a place in LAYERS"
    return max(matching, key=len)


def allowed(importer: str, imported: str) -> bool:
    first, second = group_of(importer), group_of(imported)
    if first == second:
        return True
    if first in ASIDE:
        return second in ASIDE_MAY_IMPORT
    if second in ASIDE:
        return first in MAY_IMPORT_ASIDE
    return RANKS[second] < RANKS[first]


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """Some cycle of a directed graph, as the names along it, or None."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for following in sorted(graph.get(name, ())):
            cycle = search(following, [*path, name])
            if cycle:
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := search(name, []))), None)


def test_every_module_has_a_layer() -> None:
    assert len(modules()) > 20
    for name in modules():
        group_of(name)


def test_imports_run_one_way() -> None:
    own = [i for i in imports() if i.imported.split(".")[0] == "mvmr"]
    assert len(own) > 40
    wrong = [str(i) for i in own if not allowed(i.importer, i.imported)]
    assert wrong == [], "\n".join(wrong)


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.imported in graph and not found.typing:
            graph[found.importer].add(found.imported)
    assert cycle_in(graph) is None


def test_only_the_engine_and_its_data_module_know_lightning() -> None:
    users = {i.importer for i in imports() if i.imported.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert users
    assert {name for name in users if not within(name, LIGHTNING_FILES)} == set()
    assert [str(i) for i in imports() if i.imported.split(".")[0] in ("pytorch_lightning", "lightning_fabric")] == []


def test_slow_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for found in imports():
        top = "tensorboard" if "tensorboard" in found.imported.split(".") else found.imported.split(".")[0]
        at_home = top == "lightning" and within(found.importer, LIGHTNING_FILES)
        if top in LATE and not (found.late or found.typing or at_home):
            wrong.append(str(found))
    assert wrong == []


@pytest.mark.parametrize("module", ["mvmr", "mvmr.cli"])
def test_importing_the_command_line_loads_no_heavy_package(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) & {"torch", "torchvision", "numpy", *LATE} == set()


def test_the_rules_refuse_what_they_should() -> None:
    for importer, imported in [
        ("mvmr.ops.ema", "mvmr.losses.variance"),
        ("mvmr.losses", "mvmr.methods"),
        ("mvmr.data.views", "mvmr.representations.hog"),
        ("mvmr.nets.encoders", "mvmr.data.sources"),
        ("mvmr.methods.mvmr", "mvmr.config"),
        ("mvmr.methods.mvmr", "mvmr.evaluation"),
        ("mvmr.config", "mvmr.engine.optim"),
        ("mvmr.evaluation.knn", "mvmr.methods"),
        ("mvmr.evaluation.knn", "mvmr.data.module"),
        ("mvmr.report.page", "mvmr.config"),
        ("mvmr.engine.train", "mvmr.api"),
        ("mvmr.types", "mvmr"),
        ("mvmr.api", "mvmr.cli.train"),
    ]:
        assert not allowed(importer, imported), f"{importer} -> {imported}"
    for importer, imported in [
        ("mvmr.losses.variance", "mvmr.ops.collectives"),
        ("mvmr.representations.augmented", "mvmr.data.views"),
        ("mvmr.data.module", "mvmr.representations"),
        ("mvmr.engine.callbacks", "mvmr.evaluation.knn"),
        ("mvmr.cli.train", "mvmr"),
    ]:
        assert allowed(importer, imported), f"{importer} -> {imported}"


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import os, torch.nn as nn\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from mvmr.config import Run\n"
        "try:\n    import timm\nexcept ImportError:\n    timm = None\n"
        "class A:\n    import sklearn\n    def f(self):\n        from mvmr.data import views, DATASETS\n"
        "from . import knn\nfrom ..ops.random import uniform\n"
    )
    known = {"mvmr.data", "mvmr.data.views", "mvmr.config", "mvmr.ops.random", "mvmr.evaluation.knn"}
    found = {
        i.imported: ("late" if i.late else "typing" if i.typing else "now")
        for i in imports_in(source, "mvmr.evaluation.linear", known)
    }
    assert found == {
        "os": "now",
        "torch.nn": "now",
        "typing": "now",
        "mvmr.config": "typing",
        "timm": "now",
        "sklearn": "now",
        "mvmr.data.views": "late",
        "mvmr.data": "late",
        "mvmr.evaluation.knn": "now",
        "mvmr.ops.random": "now",
    }
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
