"""A comparison from its plan to its verdict; compare.json has everything that is known, as soon as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.files import write_atomically
from eaftdrope.report.page import report_or_say
from eaftdrope.run.interrupts import only_start
from eaftdrope.run.prepare import print_audit

from .arms import Arm, Plan
from .estimate import arms_table, estimate
from .match import match
from .measuring import measure, open_bench
from .results import NAME, Results
from .table import csv_table, markdown_text, rich_table, sentences
from .training import check_arms, train_arms

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from rich.console import Console

    from .measuring import Start


def run_comparison(
    plan: Plan, console: Console, *, command: str, about: dict, bars: Callable[[], AbstractContextManager[Start]]
) -> dict:
    """Train, measure, match and judge, or go on with what the folder holds; returns compare.json.

    Args:
        command: what the user typed.
        about: where and with what; goes into compare.json as it is.
        bars: opens a display of measurements. What it gives is called with words before each of them, and what that
            returns is called with (done, total) in it.

    Raises:
        UserError: anything the user can correct, before the first arm is trained where that is possible.
        RunInterrupted: Ctrl-C while an arm is trained.
    """
    with only_start(str(plan.folder)):
        return _run(plan, console, command, about, bars)


def show_comparison(plan: Plan, console: Console) -> None:
    """`--dry-run`: the arms with the data read, no weights, nothing written.

    Raises:
        UserError: as `run_comparison` before its first arm.
    """
    check_arms(plan)
    bench = open_bench(plan)
    print_audit(bench.data, console)
    console.print(arms_table(plan))
    for line in estimate(bench):
        console.print(line, highlight=False, markup=False)


def _run(plan: Plan, console: Console, command: str, about: dict, bars) -> dict:
    check_arms(plan)
    bench = open_bench(plan)
    print_audit(bench.data, console)

    def said(arm: Arm, number: int) -> None:
        console.print(f"arm {number} of {len(plan.arms)}: {arm.label}, seed {arm.seed}", highlight=False, markup=False)

    train_arms(plan, said, command)
    results = Results(bench, command, about)
    with bars() as start:
        measure(bench, start, lambda: results.store("running"))
        if plan.match:
            results.matched = match(bench, start, lambda: results.store("running"))
    document = results.store("finished")
    base = bench.known(None)
    write_atomically(plan.folder / "compare.csv", csv_table(base, document["table"]))
    write_atomically(plan.folder / "compare.md", markdown_text(base, document, plan))
    console.print(rich_table(base, document["table"]))
    for line in sentences(document, plan):
        console.print(f"\n{line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nwritten: {plan.folder}: {NAME}, compare.md, compare.csv", highlight=False, markup=False)
    report_or_say(plan.folder, console)
    return document
