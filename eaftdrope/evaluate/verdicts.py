"""The verdict on every metric of two models that were measured with the same probes.

With the change d of a metric, its margin h (evidence.py: standard errors over the shared items, Holm's correction over the
metrics of the comparison) and a small change s that would not matter:

    better, worse          |d| > h
    no clear change        |d| + h <= s: a change that matters is ruled out
    not enough evidence    anything else: with n (h / max(|d|, s - |d|))^2 items one of the above would hold, if d stays

A metric with fewer items than it requires (`Score.least`) has no verdict and does not count as compared.
The small change is 0.02 of a mean (nats per token), 2 % of a perplexity, and two points of a share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from . import evidence
from .scores import NOT_A_NUMBER, Score, change_stderr

BETTER, WORSE = "better", "worse"
UNCLEAR = "no clear change"
UNDECIDED = "not enough evidence"
# Half of the last digit of a change in a table: a smaller change counts as zero.
RESOLUTION = {"mean": 5e-4, "exp": 5e-3, "share": 5e-4}
_SMALL = 0.02
_MOST_ITEMS = 1_000_000


@dataclass(frozen=True)
class Change:
    """A metric of two models, judged.

    Attributes:
        word: BETTER, WORSE, UNCLEAR, UNDECIDED or NOT_A_NUMBER.
        stderr: standard error of the change; None if unknown.
        margin: what a change must exceed; None if the standard error is unknown or there are too few items.
        needed: number of items that would be needed for a verdict; None if there is one, or if it is unknown.
    """

    before: Score
    after: Score
    word: str
    stderr: float | None
    margin: float | None
    needed: int | None = None

    @property
    def difference(self) -> float:
        """The change in the metric's unit."""
        return self.after.value - self.before.value

    @property
    def worsening(self) -> float:
        """The change in the metric's unit, positive if it is for the worse."""
        return self.difference if self.before.better == "lower" else -self.difference

    @property
    def need(self) -> str:
        """The items that a verdict would need as text; "" if there is a verdict."""
        if self.word != UNDECIDED:
            return ""
        if self.needed is None and self.stderr is None:
            return "one item has no error"
        if self.needed is None:
            return "no number of items would decide"
        if self.needed > _MOST_ITEMS:
            return "needs over a million items"
        return f"needs {evidence.about(self.needed)} items"

    @property
    def text(self) -> str:
        """The word, with the items that a verdict would need."""
        return f"{self.word} ({self.need})" if self.need else self.word


def judge_change(before: Score, after: Score, count: int = 1) -> Change:
    """Judge one metric; `count` is the divisor of its level (`evidence.holm`)."""
    difference, stderr = after.value - before.value, change_stderr(before, after)
    if math.isnan(difference):
        return Change(before, after, NOT_A_NUMBER, None, None)
    if _too_few(before, after):
        return Change(before, after, UNDECIDED, stderr, None, before.least)
    # a value that became infinite is worse, or better if that is its good direction
    good = BETTER if (difference < 0) == (before.better == "lower") else WORSE
    if math.isinf(difference):
        return Change(before, after, good, None, None)
    if stderr is None:
        return Change(before, after, UNDECIDED, None, None)
    margin = max(evidence.normal_quantile(count) * stderr, RESOLUTION[before.kind])
    if abs(difference) > margin:
        return Change(before, after, good, stderr, margin)
    small = small_change(before)
    if abs(difference) + margin <= small:
        return Change(before, after, UNCLEAR, stderr, margin)
    wanted = max(abs(difference), small - abs(difference))
    needed = evidence.items_needed(min(before.n, after.n), margin, wanted)
    return Change(before, after, UNDECIDED, stderr, margin, needed)


def judge_changes(pairs: Iterable[tuple[Score, Score]]) -> list[Change]:
    """Judge every metric of a comparison, with Holm's correction over those that can have a verdict."""
    pairs = list(pairs)
    p_values = [change_p(before, after) for before, after in pairs]
    counts = iter(evidence.holm([p for p in p_values if p is not None]))
    return [
        judge_change(before, after, 1 if p is None else next(counts)) for (before, after), p in zip(pairs, p_values)
    ]


def small_change(before: Score) -> float:
    """Return the largest change of a metric that would not matter, in its unit."""
    return _SMALL * (before.value if before.kind == "exp" else 1)


def change_p(before: Score, after: Score, beyond: float = 0.0) -> float | None:
    """Return the two-sided p-value of a change; None if its standard error is unknown or there are too few items.

    Args:
        beyond: how much worse the metric may be; the p-value is then of the distance from that.
    """
    stderr = change_stderr(before, after)
    if stderr is None or _too_few(before, after):
        return None
    difference = after.value - before.value
    distance = (difference if before.better == "lower" else -difference) - beyond
    if abs(distance) <= RESOLUTION[before.kind]:
        return 1.0
    return evidence.normal_p(distance / stderr) if stderr else 0.0


def _too_few(before: Score, after: Score) -> bool:
    return min(before.n, after.n) < before.least
