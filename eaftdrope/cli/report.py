"""`eaftdrope report`: render the report of a result again, or put training runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import echo


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Result folders of train, compare, inspect, context, eval, ttt eval or rlm bench; an RLM journal, or "
            "a folder of them.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page.",
            show_default="report.html in DIR; JOURNAL.html; for several runs, side_by_side.html in the first",
        ),
    ] = None,
) -> None:
    """Write one self-contained page of the results in a folder, with its figures as PNG and SVG beside it; or of an RLM run,
    from its journal. For several training runs, write one page that compares each with the first."""
    from eaftdrope.report.page import write_report, write_side_by_side

    path = write_report(folders[0], output) if len(folders) == 1 else write_side_by_side(folders, output)
    # the page of a journal has no figures
    is_journal = len(folders) == 1 and folders[0].is_file()
    echo(f"written: {path}" + ("" if is_journal else f", {path.parent / 'figures'}"))
