"""The tables of `eaftdrope context`: its cost and its results, in the terminal and as CSV.

`rows_of` turns the document into one row per number, which the CSV, the table and the figures read; a variant is called
`arm` there.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from ..scores import Score
from ..table import error_text
from .lengths import multiple
from .plan import PROBES, ContextPlan

if TYPE_CHECKING:
    from rich.table import Table

from .attention import NeedleAttention
from .needles import KINDS
from .perplexity import WindowLosses
from .retrieval import Retrieval

CAPTION = (
    "Shares in % with 95 % Wilson intervals; a trial is right if every requested number is found. ± is one standard error. "
    "attention: mass within one token of the needle, mean over heads / best head."
)


def cost_table(plan: ContextPlan) -> Table:
    """Return the table of a plan: cells and tokens by model and length."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What will be measured", title_justify="left")
    for column in ("model", "length"):
        table.add_column(column)
    for column in ("variants", "cells", "tokens"):
        table.add_column(column, justify="right")
    for model in plan.models:
        for length in model.lengths:
            cells = [cell for cell in plan.cells if (cell.model, cell.length) == (model.name, length)]
            variants = ", ".join(dict.fromkeys(cell.variant for cell in cells))
            words = f"{length:,} ({multiple(length, model.trained)})"
            table.add_row(
                Text(model.name), words, variants, f"{len(cells):,}", f"{sum(cell.tokens for cell in cells):,}"
            )
    table.add_section()
    table.add_row("all", "", "", f"{len(plan.cells):,}", f"{sum(cell.tokens for cell in plan.cells):,}")
    return table


def result_table(rows: list[dict]) -> Table:
    """Return the table of results: one line per variant and length, one column per probe that was measured."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Long context", caption=CAPTION, title_justify="left", caption_justify="left")
    head, lines = result_lines(rows)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left")
    for line in lines:
        if len(line) == 1:
            name, _, trained = line[0].rpartition(", ")
            table.add_section()
            table.add_row(Text(name, "bold"), trained)
        else:
            table.add_row(f"  {line[0]}", *line[1:])
    return table


def result_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the lines; a line with one entry heads those of a model."""
    whole = [row for row in rows if row["at"] is None]
    probes = [probe for probe in PROBES if any(row["probe"] == probe for row in whole)]
    lines = []
    for name in dict.fromkeys(row["model"] for row in whole):
        of_model = [row for row in whole if row["model"] == name and row["probe"] in PROBES]
        if not of_model:
            continue
        lines.append([f"{name}, trained {of_model[0]['trained_length']:,}"])
        for variant in dict.fromkeys(row["arm"] for row in of_model):
            for length in sorted({row["length"] for row in of_model}):
                found = [row for row in of_model if (row["arm"], row["length"]) == (variant, length)]
                shown = [_text(probe, [row for row in found if row["probe"] == probe]) for probe in probes]
                if found:
                    lines.append([variant, f"{length:,} ({found[0]['multiple']})", *shown])
    return ["variant", "length", *probes], lines


def suite_table(rows: list[dict]) -> Table | None:
    """Return the table of lm-eval's suites; None if no suite was measured."""
    from rich.table import Table
    from rich.text import Text

    head, lines = suite_lines(rows)
    if not lines:
        return None
    table = Table(title="Suites (lm-eval)", title_justify="left")
    for column in head:
        table.add_column(column, justify="right" if column in ("length", "score") else "left")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def suite_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the lines of `suite_table`."""
    lines = []
    for row in rows:
        if row["probe"] not in PROBES:
            score = f"{row['value']:.3f}{error_text(row['stderr'], 'mean')}"
            lines.append([row["model"], row["arm"], row["probe"], row["metric"], f"{row['length']:,}", score])
    return ["model", "variant", "suite", "task", "length", "score"], lines


def _text(probe: str, rows: list[dict]) -> str:
    values = {row["metric"]: row for row in rows}
    if not rows:
        return "–"
    if probe == "perplexity":
        row = values["perplexity"]
        return f"{row['value']:.2f}" + error_text(row["stderr"], "exp")
    if probe == "attention":
        return f"{values['near, mean']['value']:.3f} / {values['near, best head']['value']:.3f}"
    row = values["accuracy"]
    return f"{100 * row['value']:.0f} ({100 * row['low']:.0f}–{100 * row['high']:.0f})"


COLUMNS = {
    "model": "",
    "arm": "as is, or a baseline",
    "trained_length": "tokens",
    "probe": "",
    "length": "tokens",
    "multiple": "length / trained length",
    "metric": "",
    "at": "depth of the needle (niah), or positions of a window (perplexity); empty: over all",
    "value": "",
    "low": "95 % Wilson interval of a share",
    "high": "the same",
    "stderr": "of a perplexity, over windows; of a suite, lm-eval's",
    "n": "trials or windows",
}


def rows_of(document: dict) -> list[dict]:
    """Return a row per number of the document of `ContextResults`, with every column of `COLUMNS` (None: empty)."""
    trained = {model["name"]: model["trained_length"] for model in document["settings"]["models"]}
    rows = []
    for cell in document["cells"]:
        common = {name: cell[name] for name in ("model", "arm", "probe", "length")}
        common["trained_length"] = trained[cell["model"]]
        common["multiple"] = multiple(cell["length"], trained[cell["model"]])
        for numbers in _numbers(cell):
            rows.append({column: {**common, **numbers}.get(column) for column in COLUMNS})
    return rows


def csv_of(rows: list[dict]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    return text.getvalue()


def _numbers(cell: dict) -> list[dict]:
    probe, length, result = cell["probe"], cell["length"], cell["result"]
    if probe == "perplexity":
        return _perplexities(WindowLosses.from_json(length, result))
    if probe in KINDS:
        return _shares(Retrieval.from_json(probe, length, result))
    if probe == "attention":
        return _masses(NeedleAttention.from_json(result))
    return [{"metric": score["task"], **score} for score in result["scores"]]


def _perplexities(losses: WindowLosses) -> list[dict]:
    def row(score: Score, at: str | None = None) -> dict:
        return {"metric": "perplexity", "at": at, "value": score.value, "stderr": score.stderr, "n": score.n}

    parts = [row(score, f"{start}-{stop}") for start, stop, score in losses.by_position()]
    return [row(losses.score()), *parts]


def _shares(retrieval: Retrieval) -> list[dict]:
    def row(part: Retrieval, at: str | None = None) -> dict:
        low, high = part.interval()
        return {
            "metric": "accuracy",
            "at": at,
            "value": part.accuracy,
            "low": low,
            "high": high,
            "n": len(part.outcomes),
        }

    rows = [row(retrieval)]
    if retrieval.outcomes[0].asked > 1:
        rows.append({"metric": "recall", "value": retrieval.recall, "n": len(retrieval.outcomes)})
    return rows + [row(part, f"{depth:.3f}") for depth, part in retrieval.by_depth().items()]


def _masses(attention: NeedleAttention) -> list[dict]:
    numbers: dict[str, Any] = {"uniform": attention.uniform}
    for name in ("peak", "near", "outside"):
        numbers[f"{name}, mean"] = getattr(attention.mean, name)
        numbers[f"{name}, best head"] = getattr(attention.best, name)
    return [{"metric": metric, "value": value, "n": attention.trials} for metric, value in numbers.items()]
