"""What a comparison may say, by one rule that was written before any result.

Two arms are compared seed by seed: d_k is the difference of a metric under seed k, both trained on the same rows in the same
order. A difference is called better or worse when its mean is beyond both

    the seeds    t * sd(d) / sqrt(n)                t: Student's, two-sided 95 %, n - 1 degrees of freedom (12.7 for 2 seeds)
    the items    2 * mean of the probe's own paired standard errors       (rows, questions or windows, `change_stderr`)

and anything else is "no difference beyond the spread". The first asks whether another seed would say the same, the second
whether other rows or questions would. One seed has no spread: only the second is asked, and the sentence says so.

Of a comparison of many arms and metrics some differences will be called that are none: one in twenty, where nothing differs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eaftdrope.evaluate.scores import NOT_A_NUMBER, change_stderr

if TYPE_CHECKING:
    from eaftdrope.evaluate import Score

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# of ten degrees of freedom; for more it is a little too strict
MANY = 2.228
BETTER, WORSE, SAME = "better", "worse", "no difference beyond the spread"


@dataclass(frozen=True)
class Outcome:
    """A difference of two arms in one metric: its mean over `n` seeds, and what it must be beyond (None: it cannot be told,
    the probe has one item)."""

    metric: str
    kind: str
    difference: float
    margin: float | None
    n: int
    word: str

    @property
    def text(self) -> str:
        """`better (-1.23, beyond 0.45)`"""
        if self.word == NOT_A_NUMBER:
            return self.word
        difference = ("+" if self.difference > 0 else "") + _number(self.difference, self.kind)
        if self.margin is None:
            return f"{self.word} ({difference}; one item has no error)"
        if self.margin == 0:
            # a ± 0 would be a certainty that no measurement has
            return f"{self.word} ({difference}, the same in every item)"
        beyond = "not beyond" if self.word == SAME else "beyond"
        return f"{self.word} ({difference}, {beyond} {_number(self.margin, self.kind)})"


@dataclass(frozen=True)
class Runs:
    """An arm over its seeds: scores by metric, and those at equal target gain where they were measured."""

    label: str
    scores: dict[int, dict[str, Score]]
    matched: dict[int, dict[str, Score]]


def judge(metric: str, pairs: Sequence[tuple[Score, Score]]) -> Outcome:
    """The rule.

    Args:
        pairs: (reference, arm) of every seed; at least one.
    """
    differences = [arm.value - reference.value for reference, arm in pairs]
    mean, n = statistics.mean(differences), len(pairs)
    errors = [change_stderr(reference, arm) for reference, arm in pairs]
    margin = None if None in errors else 2 * statistics.mean(errors)
    if n > 1 and margin is not None:
        margin = max(margin, STUDENT.get(n - 1, MANY) * statistics.stdev(differences) / math.sqrt(n))
    score = pairs[0][1]
    word = SAME if math.isfinite(mean) else NOT_A_NUMBER
    if margin is not None and abs(mean) > margin:
        word = BETTER if (mean < 0) == (score.better == "lower") else WORSE
    return Outcome(metric, score.kind, mean, margin, n, word)


def compare_pair(arm: Runs, reference: Runs, target: str, general: str) -> dict:
    """One entry of `verdicts`: every metric's outcome, and a sentence on the two that stand for their groups."""
    outcomes = _outcomes(reference.scores, arm.scores)
    matched = _outcomes(reference.matched, arm.matched)
    at_equal_target = matched.get(general)
    parts = [
        f"{arm.label} against {reference.label}: {target} {outcomes[target].text}; {general} {outcomes[general].text}"
    ]
    if at_equal_target:
        parts.append(f"at equal target loss, {general} {at_equal_target.text}")
    text = "; ".join(parts) + ". " + _meaning(outcomes[target], outcomes[general], at_equal_target)
    return {
        "pair": [arm.label, reference.label],
        "text": text.strip(),
        "outcomes": [asdict(outcome) for outcome in outcomes.values()],
        "matched": [asdict(outcome) for outcome in matched.values()],
    }


def _outcomes(reference: dict[int, dict[str, Score]], arm: dict[int, dict[str, Score]]) -> dict[str, Outcome]:
    seeds = [seed for seed in arm if seed in reference]
    if not seeds:
        return {}
    return {
        metric: judge(metric, [(reference[seed][metric], arm[seed][metric]) for seed in seeds])
        for metric in arm[seeds[0]]
    }


def _meaning(target: Outcome, general: Outcome, matched: Outcome | None) -> str:
    """What a pair's outcomes say together."""
    if matched:
        return {
            BETTER: "For the same gain it keeps more.",
            WORSE: "For the same gain it forgets more.",
            SAME: "What it keeps more, it keeps by learning less." if general.word == BETTER else "",
            NOT_A_NUMBER: "",
        }[matched.word]
    if general.word == BETTER and target.word == WORSE:
        return "It gains less and forgets less: --match target tells whether that is more than learning less."
    return ""


def overall(
    verdicts: list[dict], *, target: str, general: str, base: Outcome, level: float | None, controls: list[dict]
) -> str:
    """The sentence of the whole comparison.

    Args:
        verdicts: of `compare_pair`, each against the reference of its learning rate.
        base: the reference's general metric against the base model's.
        level: share of the largest gain that the arms were brought to; None where they were not.
        controls: of `compare_pair`, an eaft arm against its constant.
    """
    n = max(outcome["n"] for entry in verdicts for outcome in entry["outcomes"])
    details = f"{n} seeds" if n > 1 else "one seed, which tells nothing about the spread over seeds"
    where = general
    if level is not None:
        where += " at equal target loss"
        details += f"; every arm taken back to {level:.0%} of the largest gain"
    fates: dict[str, list[str]] = {}
    for entry in verdicts:
        fates.setdefault(_fate(entry, target, general, level is not None), []).append(entry["pair"][0])
    said = "; ".join(f"{_listed(labels)}: {fate}" for fate, labels in fates.items())
    references = _listed(list(dict.fromkeys(entry["pair"][1] for entry in verdicts)))
    text = f"Against {references}, {where} ({details}): {said}."
    for entry in controls:
        fate = _fate(entry, target, general, level is not None)
        text += f" Against {entry['pair'][1]}, which gives every token the mean weight, {entry['pair'][0]}: {fate}."
    if base.word not in (WORSE, NOT_A_NUMBER):
        text += f" {references} has not forgotten beyond the spread itself ({base.text}), so there was little to keep."
    return text


def _fate(entry: dict, target: str, general: str, is_matched: bool) -> str:
    words = {outcome["metric"]: outcome["word"] for outcome in entry["outcomes"]}
    if is_matched:
        matched = {outcome["metric"]: outcome["word"] for outcome in entry["matched"]}
        if general not in matched:
            return "not brought to an equal target loss"
        if matched[general] == SAME and words[general] == BETTER:
            return f"{SAME} (more is kept only by learning less)"
        return {BETTER: "more is kept", WORSE: "more is forgotten"}.get(matched[general], matched[general])
    if words[general] == BETTER and words[target] == WORSE:
        return "less is forgotten and less gained (--match target tells whether that is more than learning less)"
    return {BETTER: "less is forgotten, no less gained", WORSE: "more is forgotten"}.get(words[general], words[general])


def _number(value: float, kind: str) -> str:
    """Two digits that count: differences may be far smaller than the values."""
    return f"{100 * value:.2g} points" if kind == "share" else f"{value:.2g}"


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
