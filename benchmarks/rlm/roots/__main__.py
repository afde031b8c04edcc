"""`python -m benchmarks.rlm.roots`: see the package's docstring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import run_typer

HERE = Path(__file__).resolve().parent.parent
Output = Annotated[Path, typer.Option(help="Folder for roots.json and roots.png; resumed if it has results.")]


def run(
    output: Output = HERE / "results",
    work: Annotated[Path, typer.Option(help="Folder for the trained adapters.")] = HERE / "trainings",
    minutes: Annotated[float, typer.Option(min=0.0, help="Stop after about this time; repeat to resume.")] = 8.0,
) -> None:
    """Train and measure what is missing: about 90 CPU minutes in all."""
    from .run import run as run_missing

    output.mkdir(parents=True, exist_ok=True)
    if run_missing(output / "roots.json", work, minutes, lambda line: print(line, flush=True)):
        typer.echo("nothing is missing")


def report(output: Output = HERE / "results") -> None:
    """Print the tables and draw the figure of what is measured so far."""
    from .figure import draw
    from .results import RootResults
    from .table import tables

    results = RootResults(output / "roots.json")
    typer.echo(tables(results))
    typer.echo(f"written  {draw(results, output / 'roots.png')}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *options]:
            run_typer(run, options)
        case ["report", *options]:
            run_typer(report, options)
        case _:
            sys.exit("usage: python -m benchmarks.rlm.roots {run,report} [--help]")
