"""`python -m benchmarks.dose`: see the package's docstring."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock

from benchmarks.command import run_typer
from eaftdrope.errors import UserError

from .plan import PARTS, cells

HERE = Path(__file__).resolve().parent
Output = Annotated[Path, typer.Option(help="Folder for dose.json and dose.png; resumed if it has results.")]


def run(
    output: Output = HERE / "results",
    work: Annotated[Path, typer.Option(help="Folder for weights: up to 2 GB.")] = HERE / "weights",
    minutes: Annotated[float, typer.Option(min=0.0, help="Start nothing after this time; repeat to resume.")] = 8.0,
    parts: Annotated[str, typer.Option(help="Parts of the study, in order.")] = ",".join(PARTS),
) -> None:
    """Train and measure what is missing."""
    names = tuple(parts.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"--parts {','.join(unknown)}: no such part. Parts: {', '.join(PARTS)}.")
    from eaftdrope.run.machine import keep_freed_memory

    from .results import DoseResults
    from .run import Runner, settings, subject_of

    for folder in (output, work):
        folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    deadline = time.monotonic() + 60 * minutes
    report_line = partial(print, flush=True)
    # the system releases the lock of a killed process
    with FileLock(work / "lock", timeout=0):
        results = DoseResults(output / "dose.json", settings(cells(names)))
        if Runner(results, work, partial(subject_of, work=work), deadline, report_line).run(cells(names)):
            typer.echo("nothing is missing")


def report(output: Output = HERE / "results") -> None:
    """Print the tables, draw the figure, and write what `eaftdrope inspect` quotes if the main part is complete."""
    from .figure import draw
    from .quoted import write_quoted
    from .results import DoseResults
    from .table import tables

    results = DoseResults(output / "dose.json")
    typer.echo(tables(results))
    typer.echo(f"written  {draw(results, output / 'dose.png')}")
    if output == HERE / "results":
        written = write_quoted(results)
        typer.echo(f"written  {written}" if written else "not written: the main part is not complete")


def select() -> None:
    """Select the facts that the model is sure of, and write facts.json."""
    from eaftdrope.models import load_model

    from .candidates import candidates
    from .selection import sure_facts, write_facts
    from .smollm2 import MODEL, SmolLM2

    found = sure_facts(load_model(MODEL, dtype="bfloat16").eval(), SmolLM2().tokenizer, candidates())
    typer.echo(f"written  {write_facts(found)}: {len(found)} facts")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *options]:
            run_typer(run, options)
        case ["report", *options]:
            run_typer(report, options)
        case ["select", *options]:
            run_typer(select, options)
        case _:
            sys.exit("usage: python -m benchmarks.dose {run,report,select} [--help]")
