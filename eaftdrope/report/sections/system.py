"""A pipeline as a whole: loss and needles by length, what each stage kept, answers and their cost, ablations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eaftdrope.evaluate.table import error_text, number_text

from ..blocks import Cell, Gallery, Page, PageSection, TableBlock, Text
from ..figures.curves import position_figure
from ..figures.system import lengths_figure
from ..render import FigureWriter
from ..system import collect_system, write_system
from ..words import arrowed, number, start_of

# "... at 2 x 256 tokens": the probes long_loss and long_recall
_AT = re.compile(r"(.*) at (\d+) x ([\d,]+) tokens")
_ANSWER_CHARS = 80
_ANSWERS = 40


def system_page(folder: Path, writer: FigureWriter) -> Page:
    """The page of a folder with the stages of a pipeline; system.json is collected again and written beside it."""
    write_system(folder)
    found = collect_system(folder)
    blocks = [
        *_lengths(found, writer),
        *_retention(found),
        *_stage_changes(found),
        *_positions(found, writer),
        *_answers(found),
        *_ablation_table(found),
    ]
    section = PageSection("system", "The system", blocks or [Text("Nothing was measured yet.")])
    done = ", ".join(found["states"][1:]) or "no stage yet"
    summary = f"Stages {' → '.join(found['stages'])}; measured after {done}. Each stage has a report in its own folder."
    return Page("Pipeline", folder.resolve().name, summary, [section])


def _lengths(found: dict[str, Any], writer: FigureWriter) -> list[Any]:
    """Loss and needles by length: a table and a figure for each, one line per state."""
    blocks: list[Any] = []
    for what, entries in _by_length(found["scores"]).items():
        states = [state for state in found["states"] if any(state in values for values in entries.values())]
        rows = [[state, *(_value_at(entries[at], state) for at in entries)] for state in states]
        head = ("state", *(f"{at:,} tokens" for at in entries))
        caption = f"{what} by length"
        note = "Each length scores the same tokens after more context." if what.startswith("nats") else ""
        blocks.append(TableBlock(caption, head, rows, numeric=tuple(range(1, len(head))), note=note))
        series = {
            state: [(at, entries[at][state]["value"]) for at in entries if state in entries[at]] for state in states
        }
        figure = lengths_figure(series, what)
        blocks.append(Gallery([writer.picture(f"system_{what.split()[0]}", figure, f"{caption}, a line per state.")]))
    return blocks


def _by_length(scores: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """What is measured -> length in tokens -> state -> value."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in scores:
        if match := _AT.fullmatch(entry["metric"]):
            length = int(match[2]) * int(match[3].replace(",", ""))
            kind = {state: {**value, "kind": entry["kind"]} for state, value in entry["values"].items()}
            found.setdefault(match[1], {}).setdefault(length, {}).update(kind)
    return {what: dict(sorted(lengths.items())) for what, lengths in found.items()}


def _value_at(values: dict[str, Any], state: str) -> str:
    if state not in values:
        return "–"
    value = values[state]
    return number_text(value["value"], value["kind"]) + error_text(value["stderr"], value["kind"])


def _retention(found: dict[str, Any]) -> list[Any]:
    """Every metric at every state."""
    states = found["states"]
    entries = [entry for entry in found["scores"] if len(entry["values"]) > 1]
    if not entries:
        return []
    rows = [
        [
            arrowed(entry["metric"], entry["better"]),
            *(
                _value_at({s: {**v, "kind": entry["kind"]} for s, v in entry["values"].items()}, state)
                for state in states
            ),
        ]
        for entry in entries
    ]
    head = ("metric", *states)
    note = "± is one standard error of a value; those of changes are below, and smaller, since the units are the same."
    return [TableBlock("Retention: every metric after every stage", head, rows, tuple(range(1, len(head))), note=note)]


def _stage_changes(found: dict[str, Any]) -> list[Any]:
    rows = [[f"{change['before']} → {change['stage']}", *_change_cells(change)] for change in found["changes"]]
    return [_change_table("What each stage changed", "stage", rows)] if rows else []


def _ablation_table(found: dict[str, Any]) -> list[Any]:
    rows: list[list[Any]] = []
    for ablation in found["ablations"]:
        rows.append([f"{ablation['name']}: {' → '.join(ablation['stages'])}"])
        rows += [[ablation["name"], *_change_cells(change)] for change in ablation["changes"]]
    return [_change_table("Ablations: the last state against that of the whole pipeline", "arm", rows)] if rows else []


def _change_cells(change: dict[str, Any]) -> list[str | Cell]:
    kind = change["kind"]
    difference = number_text(change["difference"], kind, signed=True) + error_text(change["stderr"], kind)
    tone = change["verdict"] if change["verdict"] in ("better", "worse") else ""
    return [
        arrowed(change["metric"], change["better"]),
        number_text(change["from"], kind),
        number_text(change["to"], kind),
        difference,
        Cell(change["verdict"], tone),
    ]


def _change_table(caption: str, first: str, rows: list[list[Any]]) -> TableBlock:
    head = (first, "metric", "from", "to", "change", "verdict")
    return TableBlock(
        caption, head, rows, numeric=(2, 3, 4), stack=True, note="± is one standard error over the same units."
    )


def _positions(found: dict[str, Any], writer: FigureWriter) -> list[Any]:
    rows = [(str(name), float(first), float(last)) for name, first, last in found["positions"]]
    if not rows:
        return []
    table = TableBlock(
        "Loss by position in the training rows of ttt, nats per token",
        ("Position", "First quarter of the training", "Last quarter"),
        [(name, number(first, 3), number(last, 3)) for name, first, last in rows],
        numeric=(1, 2),
    )
    picture = writer.picture("system_positions", position_figure(rows), "Loss by position in the training rows of ttt.")
    return [table, Gallery([picture])]


def _answers(found: dict[str, Any]) -> list[Any]:
    """What was asked, and by position the loss and the time of what was read for it."""
    answers = found["answers"][-_ANSWERS:]
    if not answers:
        return [Text("Nothing was asked yet: `eaftdrope ask` adds its answers, with their cost, to this page.")]
    rows = [
        [
            start_of(entry["question"], _ANSWER_CHARS),
            entry["method"],
            f"{entry['text_tokens']:,}",
            f"{entry['tokens']:,}",
            f"{entry['cpu_seconds']:,.1f}",
            start_of(entry["answer"], _ANSWER_CHARS) if entry["finished"] else f"none: {entry['stopped']}",
        ]
        for entry in answers
    ]
    head = ("question", "method", "tokens of the text", "tokens read and written", "CPU seconds", "answer")
    blocks = [TableBlock("Answers and their cost", head, rows, numeric=(2, 3, 4), long=(0, 5), stack=True)]
    pieces = next((entry["pieces"] for entry in reversed(answers) if entry["pieces"]), [])
    if pieces:
        lines = [
            (f"{end:,}", number(loss, 3), f"{1000 * seconds / tokens:.2f}") for end, tokens, loss, seconds in pieces
        ]
        caption = "Loss and time by position of the text that was read last"
        blocks.append(TableBlock(caption, ("up to token", "nats per token", "ms per token"), lines, numeric=(1, 2)))
    return blocks
