"""`eaftdrope inspect`: where the model disagrees with a recipe's training labels, before training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.recipe import load_recipe

from .measure import Overwrite

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 8


def inspect(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of its keys, such as data.max_length=512.", show_default=False)
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows to read, spread over the data.", show_default="all")
    ] = None,
    on_policy: Annotated[
        int, typer.Option(min=0, help="Prompts that the model answers itself, as a contrast (slow).")
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/inspect/<recipe>")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, print the plan, load no weights, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Run the untrained model over a recipe's training rows: where it is confident of another token than the label, in which
    rows, and how much of the gradient those tokens would give. Bad labels and copied noise are ranked first.

    Writes inspect.json, conflicts.jsonl, rows.jsonl and report.html.
    """
    checked = load_recipe(recipe, overrides or [])

    from eaftdrope.inspection.results import InspectionFolder
    from eaftdrope.inspection.run import prepare_inspection, run_inspection, show_plan
    from eaftdrope.run.interrupts import disk_errors_to_user_errors
    from eaftdrope.run.machine import training_device

    from .measure import about, bars
    from .terminal import make_console, show_report, silence_libraries

    silence_libraries(bars=False)
    console = make_console()
    folder = InspectionFolder(output or Path("runs") / "inspect" / recipe.stem, overwrite=overwrite)
    inspection = prepare_inspection(checked, rows=rows, on_policy=on_policy)
    show_plan(inspection, folder.path, console)
    if dry_run:
        return
    command = shlex.join(["eaftdrope", *sys.argv[1:]])
    with bars(console) as start, disk_errors_to_user_errors(str(folder.path)):
        document = run_inspection(inspection, folder, about=about(training_device().kind), command=command, start=start)
    _show(document, console)
    show_report(folder.path, console)
    console.print(f"\nwritten: {folder.path}", highlight=False, markup=False, soft_wrap=True)


def _show(document: dict, console: Console) -> None:
    from rich.table import Table

    table = Table("tokens", "share", "of the gradient's norm", "of it under the gate", box=None, pad_edge=False)
    for one in document["quadrants"]:
        table.add_row(one["name"], *(f"{one[key]:.1%}" for key in ("tokens", "gradient", "gated_gradient")))
    console.print()
    console.print(table)
    summary = document["summary"]
    console.print(
        f"nll {summary['nll']:.3f}, entropy {summary['entropy']:.3f} nats, mean gate {summary['gate']:.3f}, "
        f"confident conflicts {summary['conflict_share']:.2%}",
        highlight=False,
    )
    if document["gate_benefit"]:
        console.print(document["gate_benefit"], highlight=False, markup=False)
    _print_list(
        console,
        "worst conflicts (label <- prediction)",
        map(_conflict, document["conflicts"]),
    )
    _print_list(console, "rows to check first", map(_row, document["rows_ranked"]))


def _print_list(console: Console, title: str, lines) -> None:
    console.print(f"\n{title}", style="bold", highlight=False)
    for _, line in zip(range(_SHOWN), lines):
        # one line each, without control characters of the data
        shown = "".join(char if char.isprintable() else " " for char in line)
        console.print(shown, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")


def _conflict(one: dict) -> str:
    return (
        f"  {one['label']!r} <- {one['predicted']!r} ({one['probability']:.1g}, {one['predicted_probability']:.2f})  "
        f"{one['origin']}: ...{one['before'][-60:]}"
    )


def _row(one: dict) -> str:
    return (
        f"  {one['because_of']:9}  {one['conflicts']} of {one['tokens']} tokens, nll {one['nll']:.2f}, "
        f"{one['duplicates']} copies  {one['origin']}: {one['text']}"
    )
