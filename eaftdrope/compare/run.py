"""Run a comparison from its plan to its verdict; compare.json is updated after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.files import write_atomically
from eaftdrope.report.page import try_write_report
from eaftdrope.run.data import print_audit
from eaftdrope.run.interrupts import run_lock

from .estimate import arms_table, estimate
from .match import match
from .measurement import measure, open_measurement
from .plan import Arm, ComparisonPlan
from .results import NAME, ComparisonResults
from .table import csv_table, markdown_text, rich_table, sentences
from .training import check_arms, train_arms

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from rich.console import Console

    from .measurement import StartProgress

    Bars = Callable[[], AbstractContextManager[StartProgress]]


def run_comparison(
    plan: ComparisonPlan,
    console: Console,
    *,
    command: str,
    about: dict,
    bars: Bars,
) -> dict:
    """Train, measure, match and judge, or resume from the contents of the folder; return compare.json.

    Args:
        command: the command line.
        about: date, hardware and versions; copied into compare.json.
        bars: opens a progress display. It yields a function that is called with a description before each measurement
            and returns a function that is called with (done, total).

    Raises:
        UserError: any problem that the user can correct, before the first arm is trained if possible.
        RunInterrupted: Ctrl-C during the training of an arm.
    """
    with run_lock(str(plan.folder)):
        return _run(plan, console, command, about, bars)


def print_comparison_plan(plan: ComparisonPlan, console: Console) -> None:
    """Print the arms and an estimate (`--dry-run`): the data are read, but no weights, and nothing is written.

    Raises:
        UserError: as `run_comparison` before its first arm.
    """
    check_arms(plan)
    measurement = open_measurement(plan)
    print_audit(measurement.data, console)
    console.print(arms_table(measurement))
    for line in estimate(measurement):
        console.print(line, highlight=False, markup=False)


def _run(plan: ComparisonPlan, console: Console, command: str, about: dict, bars: Bars) -> dict:
    check_arms(plan)
    measurement = open_measurement(plan)
    print_audit(measurement.data, console)

    def starting(arm: Arm, number: int) -> None:
        console.print(
            f"arm {number} of {len(plan.trained)}: {arm.label}, seed {arm.seed}", highlight=False, markup=False
        )

    train_arms(plan, starting, command)
    results = ComparisonResults(measurement, command, about)
    if any(arm.spec.stops_early for arm in plan.trained):
        with bars() as start:
            measure(measurement, start, lambda: results.store("running"))
        train_arms(plan, starting, command, measurement.held_out_loss)
    with bars() as start:
        measure(measurement, start, lambda: results.store("running"))
        if plan.match:
            results.matched = match(measurement, start, lambda: results.store("running"))
    document = results.store("finished")
    base = measurement.known(None)
    write_atomically(plan.folder / "compare.csv", csv_table(base, document["table"]))
    write_atomically(plan.folder / "compare.md", markdown_text(base, document, plan))
    console.print(rich_table(base, document["table"]))
    for line in sentences(document, plan):
        console.print(f"\n{line}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"\nwritten: {plan.folder}: {NAME}, compare.md, compare.csv", highlight=False, markup=False, soft_wrap=True
    )
    try_write_report(plan.folder, console)
    return document
