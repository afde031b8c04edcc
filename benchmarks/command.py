"""How a benchmark is started from the command line, and how its results record that."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer

from eaftdrope.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""Where `python -m benchmarks...` runs: the processes that a benchmark starts import `benchmarks` from here."""


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment` for a process that imports `benchmarks`, wherever the benchmark was started."""
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_typer(function: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Run `function` as a command and exit; a UserError becomes text on stderr and exit code 2."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


def as_typed(module: str, arguments: Sequence[str]) -> str:
    """The command for the results, without folders, which mean nothing on another machine."""
    shown = (Path(argument).name if "/" in argument else argument for argument in arguments)
    return shlex.join(["python", "-m", module, *shown])
