"""The tables of `eaftdrope eval` for the terminal: the plan, and the scores of several models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from eaftdrope.evaluate import Score
    from eaftdrope.evaluate.suites.plan import EvaluationPlan
    from eaftdrope.evaluate.table import Line


def plan_table(plan: EvaluationPlan) -> Table:
    """Table of the steps of a plan and their data."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Evaluation", title_justify="left")
    for column in ("model", "suite", "part", "data"):
        table.add_column(column)
    for model in plan.models:
        table.add_section()
        for step in model.steps:
            table.add_row(*map(Text, (model.name, step.suite, step.name, plan.data.get(step.name, ""))))
    return table


def score_table(found: dict[str, dict[str, list[Score]]]) -> Table:
    """One column per model, those after the first with the change from it; one section per suite."""
    from rich.table import Table
    from rich.text import Text

    from eaftdrope.evaluate.table import NOTE
    from eaftdrope.report.words import arrowed, value_text

    first, *others = found
    caption = NOTE if others else "± is one standard error."
    table = Table(title="Evaluation", caption=caption, title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column(Text(first), justify="right")
    for name in others:
        table.add_column(Text(name), justify="right")
        table.add_column("change", justify="right")
    table.add_column("n", justify="right")
    changes = {name: _changes(found[first], found[name]) for name in others}
    for suite in dict.fromkeys(suite for suites in found.values() for suite in suites):
        by_model = {name: {(s.probe, s.metric): s for s in suites.get(suite, [])} for name, suites in found.items()}
        table.add_section()
        table.add_row(Text(suite, "bold"))
        for key in dict.fromkeys(key for scores in by_model.values() for key in scores):
            score = next(scores[key] for scores in by_model.values() if key in scores)
            cells = [
                text
                for name in others
                for text in (value_text(by_model[name].get(key)), _change(changes[name].get(key)))
            ]
            name = Text(f"  {arrowed(score.metric, score.better)}")
            table.add_row(name, value_text(by_model[first].get(key)), *cells, f"{score.n:,}")
    return table


def _changes(base: dict[str, list[Score]], other: dict[str, list[Score]]) -> dict[tuple[str, str], Line]:
    """Return the lines of a model against the base by probe and metric, judged together."""
    from eaftdrope.evaluate.table import comparison_lines, paired_scores

    before, after = ([score for scores in suites.values() for score in scores] for suites in (base, other))
    keys = [((old or new).probe, (old or new).metric) for old, new in paired_scores(before, after)]
    return dict(zip(keys, comparison_lines(before, after)))


def _change(line: Line | None) -> str:
    """Return the change with its paired error and its verdict, in the verdict's colour."""
    from eaftdrope.evaluate.table import STYLES
    from eaftdrope.evaluate.verdicts import UNCLEAR

    if line is None or line.judged is None:
        return "–"
    mark = "" if line.judged.word == UNCLEAR else f" {line.verdict}"
    return f"[{STYLES[line.judged.word]}]{line.change}{mark}[/]"
