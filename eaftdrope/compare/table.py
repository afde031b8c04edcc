"""Scores of all arms as a table: one row per label, with mean and standard deviation over its seeds."""

from __future__ import annotations

import csv
import io
import math
import shlex
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.evaluate.table import by_metric, error_text, number_text

if TYPE_CHECKING:
    from eaftdrope.evaluate import Score

    from .plan import ComparisonPlan

ARROWS = {"lower": "↓", "higher": "↑"}
NOTE = "Mean over seeds ± standard deviation; ↓ lower is better, ↑ higher is better."


def main_metric(scores: dict[str, Score], group: str) -> str:
    """Return the metric that represents a group: the held-out loss if measured, else the first one of the recipe."""
    names = [name for name, score in scores.items() if score.group == group]
    return next((name for name in names if scores[name].probe == "held_out_loss"), names[0])


def table_rows(base: list[Score], arms: dict[str, list[list[Score]]], gates: dict[str, list[float]]) -> list[dict]:
    """Return the rows of the table: `target` and `general` are those of `main_metric`; other metrics have their own names.

    Args:
        base: scores of the base model.
        arms: label -> the scores of each seed, from every probe.
        gates: label -> the mean gate of each seed.
    """
    names = by_metric(base)
    target, general = (main_metric(names, group) for group in ("target", "general"))
    rows = []
    for label, seeds in arms.items():
        found = [by_metric(scores) for scores in seeds]
        metrics = {name: _spread([scores[name].value for scores in found]) for name in names}
        rows.append(
            {
                "label": label,
                "n": len(seeds),
                "mean_gate": statistics.mean(gates[label]),
                "target": metrics.pop(target),
                "general": metrics.pop(general),
                **metrics,
            }
        )
    return rows


def spread_of(row: dict, name: str, names: dict[str, Score]) -> dict:
    """Return mean and standard deviation of a metric in a row of the table."""
    group = names[name].group
    return row[group] if name == main_metric(names, group) else row[name]


def rich_table(base: list[Score], rows: list[dict]) -> Table:
    """Return the table for the terminal."""
    head, lines = _cells(base, rows)
    table = Table(caption=NOTE, caption_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_text(base: list[Score], document: dict, plan: ComparisonPlan) -> str:
    """Return the table and the sentences of the comparison as Markdown."""
    head, lines = _cells(base, document["table"])
    rule = ["---", *["---:"] * (len(head) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
    return "\n\n".join([table, NOTE, *sentences(document, plan)]) + "\n"


def sentences(document: dict, plan: ComparisonPlan) -> list[str]:
    """Return the sentences on a finished comparison: verdict, pairs, arms that were not matched, and how to save one."""
    lines = [document["verdict"], *(entry["text"] for entry in document["verdicts"])]
    matched = document["matched"]
    if matched:
        lines += [f"Not matched: {one['label']}, seed {one['seed']}: {one['why']}." for one in matched["left_out"]]
        lines += [
            f"The held-out loss of {one['label']}, seed {one['seed']}, is not monotone between the base model and the "
            f"trained weights; the comparison uses the first share that reaches the level ({one['share']:.2f})."
            for one in matched["arms"]
            if not one["monotone"]
        ]
        if matched["arms"]:
            lines.append(_how_to_save(document, matched["arms"][0], plan))
    return lines


def _how_to_save(document: dict, matched: dict, plan: ComparisonPlan) -> str:
    """Return the command that writes a model of the comparison at equal target loss."""
    model = plan.recipe.model
    arm = next(a for a in document["arms"] if (a["label"], a["seed"]) == (matched["label"], matched["seed"]))
    repair = Repair(**(arm.get("repair") or {}))
    repair = replace(repair, share=repair.share * matched["share"], restore=tuple(repair.restore))
    words = ["eaftdrope", "merge", str(plan.folder / arm["folder"]), "OUTPUT", *repair.options]
    if not plan.recipe.lora:
        words += ["--base", model.reference]
        words += ["--revision", model.revision] if model.revision else []
    return f"To save {matched['label']}, seed {matched['seed']}, as compared at equal target loss: {shlex.join(words)}"


def csv_table(base: list[Score], rows: list[dict]) -> str:
    """Return CSV with one row per label and metric, the base model included."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "group", "metric", "better", "n", "mean", "sd"])
    names = by_metric(base)
    for name, score in names.items():
        writer.writerow(["base", score.group, name, score.better, 1, score.value, ""])
        for row in rows:
            spread = spread_of(row, name, names)
            sd = "" if spread["sd"] is None else spread["sd"]
            writer.writerow([row["label"], score.group, name, score.better, row["n"], spread["mean"], sd])
    return text.getvalue()


def _cells(base: list[Score], rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    names = by_metric(base)
    # target first
    order = sorted(names, key=lambda name: names[name].group != "target")
    head = ["", "seeds", "mean gate", *(f"{name} {ARROWS[names[name].better]}" for name in order)]
    first = ["base", "", "", *(number_text(names[name].value, names[name].kind) for name in order)]
    lines = [first]
    for row in rows:
        cells = [_spread_text(spread_of(row, name, names), names[name].kind) for name in order]
        lines.append([row["label"], str(row["n"]), f"{row['mean_gate']:.3f}", *cells])
    return head, lines


def _spread(values: list[float]) -> dict:
    """Return mean and sd; `sd` is None for a single value, or if a value is not finite."""
    mean = statistics.mean(values)
    return {"mean": mean, "sd": statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else None}


def _spread_text(spread: dict, kind: str) -> str:
    return number_text(spread["mean"], kind) + error_text(spread["sd"], kind)
