"""`--fail-if-worse`: which metrics of a model are clearly worse than those of the base.

    --fail-if-worse                         every metric
    --fail-if-worse perplexity:0.5          only this one, and it may be up to 0.5 worse
    --fail-if-worse --fail-if-worse perplexity:0.5      every metric; perplexity may be up to 0.5 worse

With the worsening d of a metric, its margin h (Holm's correction over the checked metrics) and the margin a that it may be
worse by (0 without a number), it is worse if d - h > a, and it passes if d + h <= a. Without a number a metric also passes
where it is better or where a change that matters is ruled out (verdicts.py). Anything else is not enough evidence, which is
reported with the number of items that would be needed, and does not fail.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from eaftdrope.errors import UserError

from .. import evidence
from ..scores import Score
from ..table import number_text, paired_scores
from ..verdicts import UNDECIDED, WORSE, Change, change_p, judge_change, small_change

LIMIT = re.compile(r"(?P<metric>.+):(?P<margin>\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+)")
"""METRIC:MARGIN, whole; a metric's name may contain colons."""
PASSED = "not worse"


@dataclass(frozen=True)
class WorseningLimits:
    """What `--fail-if-worse` requires.

    Attributes:
        every: check every metric, not only those with a margin.
        margins: metric, or name of a probe -> how much worse it may be, in the metric's unit.
    """

    every: bool = True
    margins: dict[str, float] = field(default_factory=dict)

    def margin(self, score: Score) -> float | None:
        """Return how much worse a metric may be; None if it is not checked."""
        found = self.margins.get(score.metric, self.margins.get(score.probe))
        return 0.0 if found is None and self.every else found


@dataclass(frozen=True)
class CheckedMetric:
    """A metric of a model against that of the base.

    Attributes:
        word: WORSE, PASSED or UNDECIDED.
        allowed: how much worse it may be.
        change: with the margin and the needed items of this check.
    """

    model: str
    base: str
    word: str
    allowed: float
    change: Change

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.change.before.metric

    @property
    def text(self) -> str:
        """The outcome as text, such as `worse: perplexity of tuned: +1.20 from base (margin 0.45)`."""
        change, kind = self.change, self.change.before.kind
        text = f"{self.word}: {self.metric} of {self.model}: {number_text(change.difference, kind, signed=True)}"
        text += f" from {self.base}"
        details = [] if change.margin is None else [f"margin {number_text(change.margin, kind)}"]
        if self.allowed:
            details.append(f"allowed {number_text(self.allowed, kind)}")
        if self.word == UNDECIDED:
            details.append(change.need)
        return f"{text} ({'; '.join(details)})" if details else text


def parse_limits(values: Sequence[str]) -> WorseningLimits:
    """Read the values of `--fail-if-worse`, "" where it stands without one.

    Raises:
        UserError: a value is not METRIC:MARGIN, or a metric is given twice.
    """
    margins: dict[str, float] = {}
    for value in filter(None, values):
        found = LIMIT.fullmatch(value)
        if found is None:
            raise UserError(f"--fail-if-worse {value}: expected METRIC:MARGIN, such as perplexity:0.5.")
        if found["metric"] in margins:
            raise UserError(f"--fail-if-worse {value}: {found['metric']} is given twice. Keep one.")
        margins[found["metric"]] = float(found["margin"])
    return WorseningLimits("" in values, margins)


def check_models(found: dict[str, list[Score]], limits: WorseningLimits) -> list[CheckedMetric]:
    """Check every model against the first.

    Args:
        found: model -> its scores; the first is the base.

    Raises:
        UserError: a margin is for a metric that was not measured, or a model has no metric to check.
    """
    base, *others = found
    _refuse_unknown(limits, found[base])
    checked = []
    for name in others:
        pairs = [(old, new) for old, new in paired_scores(found[base], found[name]) if old and new]
        wanted = [(old, new, margin) for old, new in pairs if (margin := limits.margin(old)) is not None]
        if not wanted:
            raise UserError(
                f"--fail-if-worse: {name} has no metric to compare with {base}, so nothing would be checked."
            )
        checked += _check_pairs(name, base, wanted)
    return checked


def _refuse_unknown(limits: WorseningLimits, scores: Iterable[Score]) -> None:
    known = dict.fromkeys(name for score in scores for name in (score.metric, score.probe))
    for name in limits.margins:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise UserError(f"--fail-if-worse {name}: no such metric was measured.{hint} Metrics: {', '.join(known)}.")


def _check_pairs(model: str, base: str, pairs: list[tuple[Score, Score, float]]) -> list[CheckedMetric]:
    p_values = [change_p(old, new, beyond=allowed) for old, new, allowed in pairs]
    counts = iter(evidence.holm([p for p in p_values if p is not None]))
    return [
        _check(model, base, judge_change(old, new, 1 if p is None else next(counts)), allowed)
        for (old, new, allowed), p in zip(pairs, p_values)
    ]


def _check(model: str, base: str, change: Change, allowed: float) -> CheckedMetric:
    old, new, margin, worsening = change.before, change.after, change.margin, change.worsening
    if change.stderr is None or margin is None:
        # NaN and infinity are worse, and one item has no error
        word = UNDECIDED if change.word == UNDECIDED else PASSED if worsening < 0 else WORSE
        return CheckedMetric(model, base, word, allowed, change)
    tolerated = allowed or small_change(old)
    if worsening - margin > allowed:
        return CheckedMetric(model, base, WORSE, allowed, change)
    if worsening + margin <= tolerated:
        return CheckedMetric(model, base, PASSED, allowed, change)
    wanted = max(worsening - allowed, tolerated - worsening)
    needed = evidence.items_needed(min(old.n, new.n), margin, wanted)
    undecided = Change(old, new, UNDECIDED, change.stderr, margin, needed)
    return CheckedMetric(model, base, UNDECIDED, allowed, undecided)


def summary(checked: Sequence[CheckedMetric]) -> str:
    """Return the outcome of all checks in a line."""
    count = {word: sum(one.word == word for one in checked) for word in (WORSE, UNDECIDED)}
    text = f"{len(checked)} metrics checked: {count[WORSE]} clearly worse"
    return f"{text}, {count[UNDECIDED]} without enough evidence" if count[UNDECIDED] else text
