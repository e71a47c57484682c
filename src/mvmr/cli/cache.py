"""mvmr cache: what is kept between runs, and how to be rid of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

cache = typer.Typer(no_args_is_help=True, help="List or clear what runs keep: representations, arrays, scans.")

Folder = Annotated[
    Path | None, typer.Option(help="As data.cache; by default $MVMR_CACHE or ~/.cache/mvmr.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@cache.command("list")
def list_cache(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the cached representations, and what else takes room in the cache folder."""
    from dataclasses import asdict

    from mvmr.cli.screen import say, show_json, show_table
    from mvmr.representations.cache_entries import entries, other_kinds

    place = _place(folder)
    found, others = entries(folder), other_kinds(folder)
    total = sum(entry.bytes for entry in found) + sum(others.values())
    if as_json:
        listed = [asdict(entry) for entry in found]
        show_json({"folder": str(place), "representations": listed, "others": others, "bytes": total})
        return
    rows = [_row(entry) for entry in found]
    rows += [["", kind, "", "", "", in_bytes(size), ""] for kind, size in others.items()]
    show_table(str(place), ["key", "kind", "data", "images", "width", "size", "made"], rows)
    say(f"{in_bytes(total)} in all; `mvmr cache clear KEY` removes an entry")


@cache.command("clear")
def clear_cache(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", show_default=False)] = None,
    folder: Folder = None,
    everything: Annotated[bool, typer.Option("--everything", help="Also arrays, checks and scans.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove cached representations: those whose keys begin as given, or all."""
    from mvmr.cli.screen import say, show_json
    from mvmr.errors import UserError
    from mvmr.representations.cache_entries import clear, clear_others, entries

    if keys and everything:
        raise UserError("--everything leaves no choice of keys: give one or the other")
    place = _place(folder)
    before = [entry.key for entry in entries(folder)]
    freed = clear(folder, [_matching(key, before) for key in keys] if keys else None)
    freed += clear_others(folder) if everything else 0
    left = {entry.key for entry in entries(folder)}
    cleared = [key for key in before if key not in left]
    if as_json:
        show_json({"folder": str(place), "cleared": cleared, "bytes": freed})
    else:
        say(f"{place}: {len(cleared)} cached representations removed, {in_bytes(freed)} freed")


def in_bytes(size: int) -> str:
    """1536 -> 1.54 kB"""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def _place(folder: Path | None) -> Path:
    """The cache folder. Raises UserError where the one that was named is not there."""
    from mvmr.data.files import cache_folder
    from mvmr.errors import UserError

    if folder is not None and not folder.expanduser().is_dir():
        raise UserError(f"--folder: {folder} is not a folder; give the one that data.cache names")
    return cache_folder(folder, "representations").parent


def _matching(prefix: str, keys: list[str]) -> str:
    """The one key that begins so."""
    from mvmr.errors import UserError

    found = [key for key in keys if key.startswith(prefix)]
    if len(found) != 1:
        what = f"{len(found)} keys begin" if found else "no key begins"
        raise UserError(f"KEY: {what} with {prefix!r}; `mvmr cache list` shows them")
    return found[0]


def _row(entry: Any) -> list[str]:
    width = f"{entry.width}" if entry.projected_from is None else f"{entry.width} of {entry.projected_from}"
    size = in_bytes(entry.bytes) if entry.complete else f"{in_bytes(entry.bytes)}, unfinished"
    # Narrow enough for 80 columns: a shortened key could not be copied.
    about = [entry.key[:8], entry.kind, entry.data, str(entry.images)]
    return [*about, f"{width} {entry.dtype}", size, entry.created[:10]]
