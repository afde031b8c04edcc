"""Before and after: the table at the top of a run's report, its verdict in one sentence, and the intervals of each value."""

from __future__ import annotations

from typing import NamedTuple

from eaftdrope.evaluate.scores import NOT_A_NUMBER, Score
from eaftdrope.evaluate.table import GROUPS, NOTE, Line, comparison_lines, error_text, paired_scores
from eaftdrope.evaluate.verdicts import BETTER, UNCLEAR, UNDECIDED, WORSE

from ..blocks import Cell, Gallery, PageSection, TableBlock
from ..figures.changes import changes_figure
from ..render import FigureWriter
from ..words import arrowed, interval_text, listing, plural, value_text

_ARROWS = "↓ lower is better, ↑ higher is better."
# A sentence names up to this many metrics; more are counted.
_NAMED = 4


class Pair(NamedTuple):
    """A metric before and after, None for a side that was not measured, and its row of the terminal's table."""

    old: Score | None
    new: Score | None
    line: Line

    @property
    def score(self) -> Score:
        score = self.old or self.new
        assert score is not None, "a pair has at least one side"
        return score

    @property
    def word(self) -> str:
        """The word of the verdict; "" without one."""
        return self.line.judged.word if self.line.judged else ""

    @property
    def clearness(self) -> float | None:
        """The change in units of its margin, positive for an improvement; None if the error is unknown."""
        judged = self.line.judged
        return -judged.worsening / judged.margin if judged and judged.margin else None


def pairs_of(before: list[Score], after: list[Score]) -> list[Pair]:
    """Match scores by probe and metric, target first."""
    lines = comparison_lines(before, after)
    return [Pair(old, new, line) for (old, new), line in zip(paired_scores(before, after), lines)]


_CHANGED = {
    BETTER: "got better",
    WORSE: "got worse",
    UNCLEAR: "showed no clear change",
    UNDECIDED: "gave not enough evidence",
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
        names = [pair.score.metric for pair in pairs if pair.word == word]
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
        tone = pair.word if pair.word in (BETTER, WORSE) else ""
        before, after = _with_error(line.before, pair.old), _with_error(line.after, pair.new)
        rows.append([line.name, before, after, line.change, Cell(line.verdict or "not measured on both sides", tone)])
    head = ("metric", "before", "after", "change", "verdict")
    return TableBlock("Before and after", head, rows, numeric=(1, 2, 3), stack=True, note=f"{NOTE} {_ARROWS}")


def _with_error(text: str, score: Score | None) -> str:
    if score is None or score.stderr is None:
        return text
    return text + error_text(score.stderr, score.kind)


def change_pictures(pairs: list[Pair], writer: FigureWriter) -> list[Gallery]:
    """Return the figure of the changes in units of their margins; empty if no error is known."""
    known = [(pair.line.name, pair.clearness) for pair in pairs if pair.clearness is not None]
    if not known:
        return []
    words = "; ".join(f"{name} {change:+.1f}" for name, change in known)
    picture = writer.picture(
        "changes",
        changes_figure(known),
        f"Changes in units of the margin of a clear change; positive is better. {words}.",
        "Each change in units of its margin. Inside the grey band it is neither better nor worse.",
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
        shown = pair.line.verdict.replace("change", "difference") or "not measured on both sides"
        rows.append([pair.line.name, pair.line.change, Cell(shown, pair.word if pair.word in (BETTER, WORSE) else "")])
    note = NOTE.replace("change", "difference")
    head = ("metric", "difference", "verdict")
    return TableBlock(f"{name} compared with {first}", head, rows, numeric=(1,), stack=True, note=note)


def difference_sentence(first: str, name: str, old: list[Score], new: list[Score]) -> str:
    """Return `change_sentence` for two independent models."""
    verbs = {
        BETTER: "came out better",
        WORSE: "came out worse",
        UNCLEAR: "did not clearly differ",
        UNDECIDED: "gave not enough evidence",
        NOT_A_NUMBER: "cannot be compared (not a number)",
    }
    return f"{name} compared with {first}: {change_sentence(pairs_of(old, new), verbs)}"
