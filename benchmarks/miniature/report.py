"""A whole run: one line per piece, then the tables, the verdict, the files and the figure."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console

from eaftdrope.errors import UserError

from . import results
from .arms import MiniatureSettings, groups, read_pieces
from .runner import prepare, run
from .table import tables


def bench_drope(settings: MiniatureSettings, *, output: Path | None, workers: int, command: str) -> dict:
    """Run the missing pieces and print the results; with `output` also write them, and resume an interrupted run.

    Raises:
        UserError: `output` belongs to other settings, there is no compiler, or some groups failed (raised after the
            other results were printed and written).
    """
    # a log has no width; rich would assume 80 columns
    console = Console() if sys.stdout.isatty() else Console(width=180)
    with tempfile.TemporaryDirectory(prefix="eaftdrope-bench-") as name:
        folder = Path(name) if output is None else output
        prepare(folder, settings)
        wanted = groups(settings)
        total = sum(len(group.arms) for group in wanted)
        done = total - len(read_pieces(folder, wanted)[1])
        console.print(f"{total} pieces, {done} finished; {workers} in parallel, one thread each")

        def report(line: str) -> None:
            there = len(read_pieces(folder, wanted)[0])
            console.print(f"[{there}/{total}] {line}", highlight=False, markup=False)

        failures = run(folder, settings, workers, report)
        pieces, missing = read_pieces(folder, wanted)
        result = results.document(pieces, missing, failures, settings, command)
        written = [] if output is None else results.write(output, result)
    for table in tables(pieces):
        console.print(table)
    for optimiser, verdict in result["verdict"].items():
        console.print(f"{optimiser}:", *(f"- {line}" for line in verdict["sentences"]), sep="\n", highlight=False)
    console.print(f"{result['cpu_seconds']['all']:,.0f} CPU seconds", highlight=False)
    if output is not None and pieces:
        from .figure import draw

        written.append(draw(result, output / "miniature.png"))
    for path in written:
        console.print(f"written  {path}", highlight=False)
    if failures:
        raise UserError("\n".join([*failures, "The same command with the same --output tries them again."]))
    return result
