"""The `mvmr` command; one file a subcommand, each importing what it needs when it runs."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

import typer

from mvmr.cli.cache import cache
from mvmr.cli.demo import demo
from mvmr.cli.doctor import doctor
from mvmr.cli.embed import embed
from mvmr.cli.evaluate import evaluate
from mvmr.cli.export import export
from mvmr.cli.listing import list_names
from mvmr.cli.pictures import pictures
from mvmr.cli.rank import rank
from mvmr.cli.splits import splits
from mvmr.cli.train import train
from mvmr.cli.tune import tune
from mvmr.errors import RunError, UserError

app = typer.Typer(
    name="mvmr", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Learn image representations without labels.",
)  # fmt: skip
app.command("demo")(demo)
app.command("train")(train)
app.command("tune")(tune)
app.command("evaluate")(evaluate)
app.command("rank")(rank)
app.command("pictures")(pictures)
app.command("embed")(embed)
app.command("export")(export)
app.command("splits")(splits)
app.command("list")(list_names)
app.command("doctor")(doctor)
app.add_typer(cache, name="cache")


def main() -> NoReturn:
    """Run a command; exit with 0 when done, 1 when it failed while working, 2 when the input was wrong."""
    warnings.showwarning = _show_warning
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")  # its use of torch, not ours
    try:
        app()
    except UserError as error:
        print(f"mvmr: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"mvmr: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    print(f"mvmr: warning: {message}", file=sys.stderr)
