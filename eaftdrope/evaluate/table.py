"""Tables as text, for the terminal and for pages; the before/after table, for the terminal and for the model card."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from .scores import NOT_A_NUMBER, Score
from .verdicts import BETTER, UNCLEAR, UNDECIDED, WORSE, Change, judge_changes

if TYPE_CHECKING:
    from rich.table import Table

GROUPS = {"target": "Target: what was trained", "general": "General: what may be forgotten"}
STYLES = {BETTER: "green", WORSE: "red", UNCLEAR: "dim", UNDECIDED: "yellow", NOT_A_NUMBER: "red"}
"""Verdict -> its style in the terminal."""
NOTE = (
    "± is one standard error. A change is called better or worse beyond two standard errors of it, more for several metrics "
    "(Holm's correction)."
)


class TextTable(NamedTuple):
    """A table as text. The first `names` columns are words, aligned to the left; the others are numbers."""

    title: str
    head: list[str]
    lines: list[list[str]]
    note: str = ""
    names: int = 1


def as_table(table: TextTable) -> Table:
    """Return the rich table."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
    for number, column in enumerate(table.head):
        made.add_column(Text(column), justify="left" if number < table.names else "right")
    for line in table.lines:
        made.add_row(*map(Text, line))
    return made


class Line(NamedTuple):
    """One row as text; `judged` is None, and `verdict` "", if one of the two sides was not measured."""

    group: str
    name: str
    before: str
    after: str
    change: str
    judged: Change | None = None

    @property
    def verdict(self) -> str:
        """The word of the verdict, and the number of items that one would need."""
        return self.judged.text if self.judged else ""


def paired_scores(before: list[Score], after: list[Score]) -> list[tuple[Score | None, Score | None]]:
    """Return scores matched by probe and metric, target first; None on the side that was not measured."""
    olds = {(score.probe, score.metric): score for score in before}
    news = {(score.probe, score.metric): score for score in after}
    groups = {key: score.group for key, score in {**news, **olds}.items()}
    keys = sorted({**olds, **news}, key=lambda key: list(GROUPS).index(groups[key]))
    return [(olds.get(key), news.get(key)) for key in keys]


def comparison_lines(before: list[Score], after: list[Score]) -> list[Line]:
    """Return the rows of the table; a score that only one side has is shown with a dash."""
    pairs = paired_scores(before, after)
    return [_line(old, new, judged) for (old, new), judged in zip(pairs, judged_pairs(pairs))]


def judged_pairs(pairs: list[tuple[Score | None, Score | None]]) -> list[Change | None]:
    """Return the verdict of every pair, judged together; None where one of the two sides was not measured."""
    judged = iter(judge_changes((old, new) for old, new in pairs if old and new))
    return [next(judged) if old and new else None for old, new in pairs]


def by_metric(scores: list[Score]) -> dict[str, Score]:
    """Return scores by the name of their metric; one that occurs again (another file) is numbered."""
    found: dict[str, Score] = {}
    for score in scores:
        name, number = score.metric, 2
        while name in found:
            name, number = f"{score.metric} ({number})", number + 1
        found[name] = score
    return found


def comparison(before: list[Score], after: list[Score]) -> Table:
    """Return the rich table of two runs of the same probes."""
    from rich.table import Table

    table = Table(title="Before and after", caption=NOTE, title_justify="left", caption_justify="left")
    table.add_column("")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    table.add_column("")
    group = None
    for line in comparison_lines(before, after):
        if line.group != group:
            table.add_section()
            table.add_row(f"[bold]{GROUPS[line.group]}[/bold]")
            group = line.group
        mark = f"[{STYLES[line.judged.word]}]{line.verdict}[/]" if line.judged else ""
        table.add_row(f"  {line.name}", line.before, line.after, line.change, mark)
    return table


def comparison_markdown(before: list[Score], after: list[Score]) -> str:
    """Return the same table as Markdown, ending in a line break."""
    rows = ["| | before | after | change | |", "|---|---:|---:|---:|---|"]
    group = None
    for line in comparison_lines(before, after):
        if line.group != group:
            rows.append(f"| **{GROUPS[line.group]}** | | | | |")
            group = line.group
        rows.append(f"| {line.name} | {line.before} | {line.after} | {line.change} | {line.verdict} |")
    return "\n".join(rows) + f"\n\n{NOTE}\n"


def _line(old: Score | None, new: Score | None, judged: Change | None) -> Line:
    score = old or new
    assert score is not None, "a pair has at least one side"
    arrow = "↓" if score.better == "lower" else "↑"
    name = f"{score.metric} {arrow}"
    change = "–"
    if judged is not None and math.isfinite(judged.difference):
        change = number_text(judged.difference, score.kind, signed=True) + error_text(judged.stderr, score.kind)
    return Line(score.group, name, _value(old), _value(new), change, judged)


def _value(score: Score | None) -> str:
    if score is None:
        return "–"
    if score.kind == "share" and math.isfinite(score.value):
        return f"{number_text(score.value, 'share')} ({round(score.value * score.n)}/{score.n})"
    return number_text(score.value, score.kind)


def number_text(value: float, kind: str, *, signed: bool = False) -> str:
    """Return a score's value, change or standard error as text, by the score's kind; NaN and infinity in words."""
    if not math.isfinite(value):
        return NOT_A_NUMBER if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    # z: a value that rounds to 0 has no minus
    sign = "+z" if signed else "z"
    if kind == "share":
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign}.{2 if kind == 'exp' else 3}f}"


def error_text(error: float | None, kind: str) -> str:
    """Return ` ± 0.012`, a standard error or deviation, with enough digits not to be 0; "" if it is None or 0.

    No measurement has an error of 0: it would be a rounding, or all units equal.
    """
    if not error:
        return ""
    text = number_text(error, kind)
    if float(text.removesuffix(" %")) == 0:
        text = f"{100 * error:.1g} %" if kind == "share" else f"{error:.1g}"
    return f" ± {text}"
