"""Habits of the project that no tool checks: sizes, portable text, and files that must agree with each other."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "docs", "benchmarks", ".ci")
NOT_OURS = re.compile(r"(^|/)(__pycache__|[^/]+\.egg-info|\.DS_Store)(/|$)")
# Spelt in pieces, because this file is searched too.
FORBIDDEN = {
    "a path of one machine": re.compile("/wo" + "rk/|/tmp" + "/w/|/ho" + "me/|/Us" + "ers/"),
    "a registry's address": re.compile("index" + "-url|https?://py" + "pi|/sim" + "ple/", re.IGNORECASE),
    "an unfinished mark": re.compile(r"\b(TO" + "DO|FIX" + r"ME)\b"),
    "a private key": re.compile("BEGIN [A-Z ]*PRIV" + "ATE KEY"),
    "trailing space or a tab in the text": re.compile(r"[ \t]+$", re.MULTILINE),
}


@cache
def files() -> list[Path]:
    """Every file of the project, from the root and the folders that are ours; not what a build or a run left there."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if not NOT_OURS.search(path.relative_to(ROOT).as_posix()))


@cache
def texts() -> dict[str, str]:
    found = {}
    for path in files():
        data = path.read_bytes()
        if b"\0" not in data:
            found[path.relative_to(ROOT).as_posix()] = data.decode()
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_sources_have_at_most_300_lines() -> None:
    sizes = {name: text.count("\n") for name, text in texts().items() if re.match(r"src/.*\.py$", name)}
    assert len(sizes) > 20
    assert {name: lines for name, lines in sizes.items() if lines > 300} == {}


def test_no_file_is_larger_than_300_kilobytes() -> None:
    assert {path.name: path.stat().st_size for path in files() if path.stat().st_size > 300_000} == {}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_text_holds(what: str) -> None:
    found = {}
    for name, text in texts().items():
        if name == "LICENSE":
            continue
        for match in FORBIDDEN[what].finditer(text):
            found[f"{name}:{text.count(chr(10), 0, match.start()) + 1}"] = match.group()
    assert found == {}


def test_the_forbidden_patterns_find_what_they_should() -> None:
    examples = {
        "a path of one machine": "cd /wo" + "rk/main",
        "a registry's address": "pip install --extra-index" + "-url https://x/sim" + "ple/",
        "an unfinished mark": "# TO" + "DO: later",
        "a private key": "-----BEGIN RSA PRIV" + "ATE KEY-----",
        "trailing space or a tab in the text": "x = 1 \ny",
    }
    assert examples.keys() == FORBIDDEN.keys()
    assert all(FORBIDDEN[what].search(text) for what, text in examples.items())


def test_texts_end_with_one_line_end() -> None:
    assert [n for n, t in texts().items() if t and (not t.endswith("\n") or t.endswith("\n\n") or "\r" in t)] == []


def test_every_recipe_is_a_mapping_and_opens_with_what_it_is() -> None:
    recipes = sorted((ROOT / "src/mvmr/recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        text = path.read_text()
        assert text.startswith("#"), f"{path.name} opens without a comment"
        assert isinstance(yaml.safe_load(text), dict), path.name


def test_the_changelog_has_the_version() -> None:
    assert f"## [{project()['project']['version']}]" in texts()["CHANGELOG.md"]


def test_the_makefile_has_its_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", texts()["Makefile"], re.MULTILINE))
    assert {"help", "demo", "test", "check", "format", "clean"} <= targets
    assert "make test" in texts()[".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run is not executable"


def test_constraints_are_plain_versions_and_cover_the_dependencies() -> None:
    lines = texts()["constraints.txt"].splitlines()
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    assert len(pinned) == len(lines)
    assert not {name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))}
    extras = project()["project"]["optional-dependencies"]
    asked = [*project()["project"]["dependencies"], *extras["test"], *extras["dev"], *extras["docs"]]
    names = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in asked} - {"mvmr"}
    assert names - pinned == set()


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for name, text in texts().items():
        if not name.endswith(".md"):
            continue
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not (ROOT / name).parent.joinpath(target).exists():
                broken.append(f"{name}: {target}")
    assert broken == []


def test_documents_name_only_settings_that_exist() -> None:
    from mvmr.config import Run
    from mvmr.methods import METHODS

    sections = {name: field.annotation for name, field in Run.model_fields.items()}
    of_methods = {key for method in METHODS.values() for key in method.Config.model_fields}
    checked, unknown = 0, []
    for name, text in texts().items():
        if not name.endswith(".md"):
            continue
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for section, key in re.findall(r"(?<![\w./-])([a-z]+)\.([a-z_]+)(?![\w(/])", "\n".join(spans)):
            known = of_methods if section == "method" else getattr(sections.get(section), "model_fields", None)
            if known is None or key in ("md", "py", "safetensors"):  # names of files
                continue
            checked += 1
            if key not in known:
                unknown.append(f"{name}: {section}.{key}")
    assert checked > 30
    assert unknown == []


def test_every_page_is_in_the_sites_navigation() -> None:
    listed = set(re.findall(r'"([\w/-]+\.md)"', texts()["zensical.toml"]))
    assert listed == {name.removeprefix("docs/") for name in texts() if re.match(r"docs/.*\.md$", name)}
