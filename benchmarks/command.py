"""Command lines of the benchmarks: running them, and recording them in the results."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer

from eaftdrope.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The folder from which the subprocesses of a benchmark import `benchmarks`."""


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `environment` for a subprocess that imports `benchmarks`, independent of the working directory."""
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_typer(function: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Run `function` as a command and exit; print a UserError to stderr and exit with code 2."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


def as_typed(module: str, arguments: Sequence[str]) -> str:
    """Return the command for the results, without folders, which exist on this machine only."""
    shown = (Path(argument).name if "/" in argument else argument for argument in arguments)
    return shlex.join(["python", "-m", module, *shown])
