"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mvmr.types import Result


def say(text: str) -> None:
    """A message to the reader, on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def own_name() -> str:
    """How the reader calls this command: `mvmr` where the shell finds it, else its path, as after `make demo`."""
    called = sys.argv[0]
    return called if os.sep in called and shutil.which("mvmr") is None and Path(called).name == "mvmr" else "mvmr"


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def show_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2))


def show_results(results: Sequence[Result], *, as_json: bool) -> None:
    """Results as tables, or as one JSON object: each encoder's, then the differences between them."""
    from mvmr.evaluation.comparison import compare

    differences = compare(results)
    if as_json:
        listed = [result.as_json() for result in results]
        show_json({"results": listed, "differences": [asdict(each) for each in differences]})
        return
    for data, split in dict.fromkeys((result.data, result.split) for result in results):
        shown = [result for result in results if (result.data, result.split) == (data, split)]
        # Values of single classes (ap11/dog) are in the JSON and the results folder.
        names = sorted({name for result in shown for name in result.metrics if "/" not in name})
        names = [name for name in names if not _is_end(name, names)]
        rows = [
            [result.encoder, result.evaluation, *(_with_ends(result.metrics, name) for name in names)]
            for result in shown
        ]
        show_table(f"{data}, {split} split", ["encoder", "evaluation", *names], rows)
    if differences:
        rows = [
            [d.encoder, d.evaluation, d.metric, f"{d.difference:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"]
            for d in differences
        ]
        title = f"ahead of {differences[0].against}, image by image, with 95 % intervals"
        show_table(title, ["encoder", "evaluation", "metric", "difference"], rows)


def _is_end(name: str, names: Sequence[str]) -> bool:
    """Whether a metric is the end of another one's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in names for end in ("_low", "_high"))


def _with_ends(metrics: dict[str, float], name: str) -> str:
    """56.10 [55.12, 57.07]"""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return _number(metrics.get(name)) + ends


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() and value > 100 else f"{value:.2f}"
