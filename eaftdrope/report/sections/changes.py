"""Before and after: the table that every report of a run begins with, its verdict in a sentence, and its intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

from eaftdrope.evaluate.scores import NOT_A_NUMBER, Score, change_stderr, verdict
from eaftdrope.evaluate.table import GROUPS, NOTE, Line, comparison_lines, error_text, paired_scores

from ..blocks import Cell, Gallery, Section, Table
from ..figures.changes import changes_figure
from ..render import Drawer
from ..words import arrowed, interval_text, listing, plural, value_text

_ARROWS = "↓ lower is better, ↑ higher is better."
# More names than this are counted instead.
_NAMED = 4


class Pair(NamedTuple):
    """A metric on both sides; None where it was not measured."""

    old: Score | None
    new: Score | None

    @property
    def score(self) -> Score:
        return self.old or self.new

    @property
    def line(self) -> Line:
        """As the table on the screen has it."""
        return comparison_lines([self.old] if self.old else [], [self.new] if self.new else [])[0]

    @property
    def clearness(self) -> float | None:
        """The change in its standard errors, positive where it is better; None where that is not known."""
        if self.old is None or self.new is None:
            return None
        stderr = change_stderr(self.old, self.new)
        if stderr is None:
            return None
        change = self.new.value - self.old.value
        sign = 1 if self.old.better == "higher" else -1
        return sign * change / stderr if stderr else math.copysign(math.inf, sign * change) if change else 0.0


def pairs_of(before: list[Score], after: list[Score]) -> list[Pair]:
    """Scores matched by probe and metric, target first."""
    return [Pair(old, new) for old, new in paired_scores(before, after)]


_CHANGED = {
    "better": "got better",
    "worse": "got worse",
    "no clear change": "showed no clear change",
    NOT_A_NUMBER: "is not a number",
}


def change_sentence(pairs: list[Pair], verbs: dict[str, str] = _CHANGED) -> str:
    """What got better and worse by the rule of the table, in one sentence; `verbs` is how each verdict is said."""
    parts = []
    for group, where in (("target", "On the target"), ("general", "in general")):
        said = _said([pair for pair in pairs if pair.score.group == group and pair.old and pair.new], verbs)
        if said:
            parts.append(f"{where}, {said}" if parts or group == "target" else f"{where.capitalize()}, {said}")
    return "; ".join(parts) + "." if parts else "Nothing was measured on both sides."


def _said(pairs: list[Pair], verbs: dict[str, str]) -> str:
    said = []
    for word, verb in verbs.items():
        names = [pair.score.metric for pair in pairs if verdict(pair.old, pair.new) == word]
        if names:
            subject = listing(names) if len(names) <= _NAMED else plural(len(names), "metric")
            said.append(f"{subject} {verb}")
    return ", ".join(said)


def change_table(pairs: list[Pair]) -> Table:
    """Before, after, change and verdict of every metric."""
    rows, group = [], None
    for pair in pairs:
        line = pair.line
        if line.group != group:
            group = line.group
            rows.append([GROUPS[group]])
        tone = line.verdict if line.verdict in ("better", "worse") else ""
        before, after = _with_error(line.before, pair.old), _with_error(line.after, pair.new)
        rows.append([line.name, before, after, line.change, Cell(line.verdict or "not on both sides", tone)])
    head = ("metric", "before", "after", "change", "verdict")
    return Table("Before and after", head, rows, numeric=(1, 2, 3), stack=True, note=f"{NOTE} {_ARROWS}")


def _with_error(text: str, score: Score | None) -> str:
    if score is None or score.stderr is None:
        return text
    return text + error_text(score.stderr, score.kind)


def change_pictures(pairs: list[Pair], drawer: Drawer) -> list[Gallery]:
    """How clear the changes are, none where no error is known."""
    known = [(pair.line.name, pair.clearness) for pair in pairs if pair.clearness is not None]
    if not known:
        return []
    words = "; ".join(f"{name} {change:+.1f}" for name, change in known)
    picture = drawer.picture(
        "changes",
        changes_figure(known),
        f"Changes in their standard errors, better is positive. {words}.",
        "Every change in its own standard errors. In the grey band there is no clear change.",
    )
    return [Gallery([picture])]


def probe_section(pairs: list[Pair]) -> Section:
    """Every number that was measured with its interval."""
    rows = []
    for pair in pairs:
        for when, score in (("before", pair.old), ("after", pair.new)):
            if score is not None:
                name = arrowed(score.metric, score.better)
                value = value_text(score)
                rows.append([name, score.probe, when, value, interval_text(score), f"{score.n:,}"])
    head = ("metric", "probe", "when", "value", "95 % interval", "units")
    note = (
        "Units are what the probe counts: rows, windows of text or questions. The intervals are of one side alone; the "
        "change in the table above is over the same units, and often surer."
    )
    return Section("probes", "Probes", [Table("Each side by itself", head, rows, numeric=(3, 4, 5), note=note)])


def difference_table(first: str, name: str, old: list[Score], new: list[Score]) -> Table:
    """How far a model is from another one, over the same units where they were the same."""
    rows = []
    for pair in pairs_of(old, new):
        word = pair.line.verdict
        shown = word.replace("change", "difference") or "not on both sides"
        rows.append([pair.line.name, pair.line.change, Cell(shown, word if word in ("better", "worse") else "")])
    note = NOTE.replace("change", "difference")
    head = ("metric", "difference", "verdict")
    return Table(f"{name}, compared with {first}", head, rows, numeric=(1,), stack=True, note=note)


def difference_sentence(first: str, name: str, old: list[Score], new: list[Score]) -> str:
    """`change_sentence` of two models that do not come one from the other."""
    verbs = {"better": "better", "worse": "worse", "no clear change": "not clearly different"}
    verbs[NOT_A_NUMBER] = "not to be compared (not a number)"
    return f"{name} against {first}: {change_sentence(pairs_of(old, new), verbs)}"
