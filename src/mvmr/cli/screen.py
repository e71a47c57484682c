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
    """Results as one table, or as one JSON object."""
    if as_json:
        show_json({"results": [asdict(result) for result in results]})
        return
    # Values of single classes (ap11/dog) are in the JSON and the results folder.
    names = sorted({name for result in results for name in result.metrics if "/" not in name})
    rows = [
        [result.encoder, result.evaluation, *(_number(result.metrics.get(name)) for name in names)]
        for result in results
    ]
    data = results[0].data if results else ""
    show_table(f"{data}, test split", ["encoder", "evaluation", *names], rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() and value > 100 else f"{value:.2f}"
