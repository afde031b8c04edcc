"""Before and after: the table at the top of a run's report, its verdict in one sentence, and the intervals of each value."""

from __future__ import annotations

import math
from typing import NamedTuple

from eaftdrope.evaluate.scores import NOT_A_NUMBER, Score, change_stderr, verdict
from eaftdrope.evaluate.table import GROUPS, NOTE, Line, comparison_lines, error_text, paired_scores

from ..blocks import Cell, Gallery, PageSection, TableBlock
from ..figures.changes import changes_figure
from ..render import FigureWriter
from ..words import arrowed, interval_text, listing, plural, value_text

_ARROWS = "↓ lower is better, ↑ higher is better."
# A sentence names up to this many metrics; more are counted.
_NAMED = 4


class Pair(NamedTuple):
    """A metric before and after; None for a side that was not measured."""

    old: Score | None
    new: Score | None

    @property
    def score(self) -> Score:
        score = self.old or self.new
        assert score is not None, "a pair has at least one side"
        return score

    @property
    def line(self) -> Line:
        """The row of the terminal's table."""
        return comparison_lines([self.old] if self.old else [], [self.new] if self.new else [])[0]

    @property
    def clearness(self) -> float | None:
        """The change in units of its standard error, positive for an improvement; None if the error is unknown."""
        if self.old is None or self.new is None:
            return None
        stderr = change_stderr(self.old, self.new)
        if stderr is None:
            return None
        change = self.new.value - self.old.value
        sign = 1 if self.old.better == "higher" else -1
        return sign * change / stderr if stderr else math.copysign(math.inf, sign * change) if change else 0.0


def pairs_of(before: list[Score], after: list[Score]) -> list[Pair]:
    """Match scores by probe and metric, target first."""
    return [Pair(old, new) for old, new in paired_scores(before, after)]


_CHANGED = {
    "better": "got better",
    "worse": "got worse",
    "no clear change": "showed no clear change",
    NOT_A_NUMBER: "is not a number",
}


def change_sentence(pairs: list[Pair], verbs: dict[str, str] = _CHANGED) -> str:
    """Return one sentence on the metrics that got better and worse by the table's rule; `verbs`: verdict -> wording."""
    parts = []
    for group, where in (("target", "on the target"), ("general", "in general")):
        sentence = _group_sentence(
            [pair for pair in pairs if pair.score.group == group and pair.old and pair.new], verbs
        )
        if sentence:
            parts.append(f"{where if parts else where.capitalize()}, {sentence}")
    return "; ".join(parts) + "." if parts else "No metric was measured both before and after."


def _group_sentence(pairs: list[Pair], verbs: dict[str, str]) -> str:
    clauses = []
    for word, verb in verbs.items():
        names = [pair.score.metric for pair in pairs if verdict(pair.old, pair.new) == word]
        if names:
            subject = listing(names) if len(names) <= _NAMED else plural(len(names), "metric")
            clauses.append(f"{subject} {verb}")
    return ", ".join(clauses)


def change_table(pairs: list[Pair]) -> TableBlock:
    """Return the table of before, after, change and verdict of every metric."""
    rows, group = [], None
    for pair in pairs:
        line = pair.line
        if line.group != group:
            group = line.group
            rows.append([GROUPS[group]])
        tone = line.verdict if line.verdict in ("better", "worse") else ""
        before, after = _with_error(line.before, pair.old), _with_error(line.after, pair.new)
        rows.append([line.name, before, after, line.change, Cell(line.verdict or "not measured on both sides", tone)])
    head = ("metric", "before", "after", "change", "verdict")
    return TableBlock("Before and after", head, rows, numeric=(1, 2, 3), stack=True, note=f"{NOTE} {_ARROWS}")


def _with_error(text: str, score: Score | None) -> str:
    if score is None or score.stderr is None:
        return text
    return text + error_text(score.stderr, score.kind)


def change_pictures(pairs: list[Pair], writer: FigureWriter) -> list[Gallery]:
    """Return the figure of the changes in units of their standard errors; empty if no error is known."""
    known = [(pair.line.name, pair.clearness) for pair in pairs if pair.clearness is not None]
    if not known:
        return []
    words = "; ".join(f"{name} {change:+.1f}" for name, change in known)
    picture = writer.picture(
        "changes",
        changes_figure(known),
        f"Changes in units of their standard errors; positive is better. {words}.",
        "Each change in units of its standard error. Inside the grey band there is no clear change.",
    )
    return [Gallery([picture])]


def probe_section(pairs: list[Pair]) -> PageSection:
    """Return the section with every measured value and its interval."""
    rows = []
    for pair in pairs:
        for when, score in (("before", pair.old), ("after", pair.new)):
            if score is not None:
                name = arrowed(score.metric, score.better)
                value = value_text(score)
                rows.append([name, score.probe, when, value, interval_text(score), f"{score.n:,}"])
    head = ("metric", "probe", "when", "value", "95 % interval", "units")
    note = (
        "Units are what the probe counts: rows, windows of text or questions. Each interval is of one side only; the "
        "change in the table above is paired over the same units and is often more precise."
    )
    return PageSection(
        "probes", "Probes", [TableBlock("Each side separately", head, rows, numeric=(3, 4, 5), note=note)]
    )


def difference_table(first: str, name: str, old: list[Score], new: list[Score]) -> TableBlock:
    """Return the table of differences of a model from the first, paired over the same units where possible."""
    rows = []
    for pair in pairs_of(old, new):
        word = pair.line.verdict
        shown = word.replace("change", "difference") or "not measured on both sides"
        rows.append([pair.line.name, pair.line.change, Cell(shown, word if word in ("better", "worse") else "")])
    note = NOTE.replace("change", "difference")
    head = ("metric", "difference", "verdict")
    return TableBlock(f"{name} compared with {first}", head, rows, numeric=(1,), stack=True, note=note)


def difference_sentence(first: str, name: str, old: list[Score], new: list[Score]) -> str:
    """Return `change_sentence` for two independent models."""
    verbs = {"better": "came out better", "worse": "came out worse", "no clear change": "did not clearly differ"}
    verbs[NOT_A_NUMBER] = "cannot be compared (not a number)"
    return f"{name} compared with {first}: {change_sentence(pairs_of(old, new), verbs)}"
