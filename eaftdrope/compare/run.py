"""A comparison from its plan to its verdict; compare.json has everything that is known, as soon as it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..evaluate.table import by_metric
from ..recipe.dump import dump_recipe
from ..recipe.lock import only_start
from ..recipe.prepare import print_audit
from .arms import Arm, Plan
from .estimate import arms_table, estimate
from .measuring import Bench, measure, open_bench
from .store import write_whole
from .table import csv_table, main_metric, markdown_table, rich_table, table_rows
from .training import check_arms, facts, train_arms

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from rich.console import Console

    from .measuring import Start

NAME = "compare.json"


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
        console.print(line, highlight=False)


def _run(plan: Plan, console: Console, command: str, about: dict, bars) -> dict:
    check_arms(plan)
    bench = open_bench(plan)
    print_audit(bench.data, console)

    def said(arm: Arm, number: int) -> None:
        console.print(f"arm {number} of {len(plan.arms)}: {arm.label}, seed {arm.seed}", highlight=False)

    train_arms(plan, said, command)
    trained = {arm: facts(plan.path(arm)) for arm in plan.arms}

    def store(status: str) -> dict:
        document = _document(bench, trained, command, about, status)
        write_whole(plan.folder / NAME, json.dumps(document) + "\n")
        return document

    with bars() as start:
        measure(bench, start, lambda: store("running"))
    document = store("finished")
    base = bench.known(None)
    write_whole(plan.folder / "compare.csv", csv_table(base, document["table"]))
    write_whole(plan.folder / "compare.md", markdown_table(base, document["table"]))
    console.print(rich_table(base, document["table"]))
    console.print(f"written: {plan.folder}: {NAME}, compare.md, compare.csv", highlight=False)
    return document


def _document(bench: Bench, trained: dict[Arm, dict], command: str, about: dict, status: str) -> dict:
    plan, base = bench.plan, bench.known(None)
    scores = {arm: bench.known(arm) for arm in plan.arms}
    names = by_metric(base)
    measured = [arm for arm in plan.arms if len(scores[arm]) == len(base)]
    labels = [label for label in plan.labels if any(arm.label == label for arm in measured)]
    is_whole = {score.group for score in base} >= {"target", "general"}
    return {
        "kind": "compare",
        "about": about,
        "command": command,
        "recipe": dump_recipe(plan.recipe, folder=plan.folder),
        "status": status,
        "base": [asdict(score) for score in base],
        "target": main_metric(names, "target") if is_whole else None,
        "general": main_metric(names, "general") if is_whole else None,
        "arms": [
            {
                "gate": arm.gate.name,
                "label": arm.label,
                "seed": arm.seed,
                "learning_rate": arm.learning_rate,
                "folder": f"arms/{arm.name}",
                **trained[arm],
                "scores": [asdict(score) for score in scores[arm]],
            }
            for arm in plan.arms
        ],
        "matched": None,
        "table": table_rows(
            base,
            {label: [scores[arm] for arm in measured if arm.label == label] for label in labels},
            {label: [trained[arm]["mean_gate"] for arm in measured if arm.label == label] for label in labels},
        )
        if is_whole
        else [],
        "verdicts": [],
        "verdict": "",
    }
