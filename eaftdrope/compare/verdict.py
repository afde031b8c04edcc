"""The verdict of a comparison, by one rule that was fixed before any result.

Two arms are compared seed by seed: d_k is the difference of a metric under seed k, both trained on the same rows in the same
order. A difference is called better or worse if its mean is beyond both

    the seeds    t * sd(d) / sqrt(n)                t: Student's, two-sided 95 %, n - 1 degrees of freedom (12.7 for 2 seeds)
    the items    2 * mean of the probe's own paired standard errors       (rows, questions or windows, `change_stderr`)

and anything else is "no difference beyond the spread". The first tests whether another seed would give the same result, the
second whether other rows or questions would. One seed has no spread: only the second applies, and the sentence states it.

In a comparison of many arms and metrics, some differences are called by chance: one in twenty, where nothing differs.
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
# for ten degrees of freedom; slightly too strict for more
MANY = 2.228
BETTER, WORSE, SAME = "better", "worse", "no difference beyond the spread"


@dataclass(frozen=True)
class Outcome:
    """The difference of two arms in one metric: its mean over `n` seeds, and the margin that it must exceed (None: the
    probe has one item, so its error is unknown)."""

    metric: str
    kind: str
    difference: float
    margin: float | None
    n: int
    word: str

    @property
    def text(self) -> str:
        """The outcome as text, such as `better (-1.23, beyond 0.45)`."""
        if self.word == NOT_A_NUMBER:
            return self.word
        difference = ("+" if self.difference > 0 else "") + _number(self.difference, self.kind)
        if self.margin is None:
            return f"{self.word} ({difference}; one item has no error)"
        if self.margin == 0:
            # no measurement is certain, so ± 0 is not shown
            return f"{self.word} ({difference}, the same in every item)"
        beyond = "not beyond" if self.word == SAME else "beyond"
        return f"{self.word} ({difference}, {beyond} {_number(self.margin, self.kind)})"


@dataclass(frozen=True)
class ScoresBySeed:
    """The scores of an arm: seed -> metric -> score, and the same at equal target gain if measured."""

    label: str
    scores: dict[int, dict[str, Score]]
    matched: dict[int, dict[str, Score]]


def judge(metric: str, pairs: Sequence[tuple[Score, Score]]) -> Outcome:
    """Judge the differences of one metric by the rule of this module.

    Args:
        pairs: (reference, arm) of each seed; at least one.
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


def compare_pair(arm: ScoresBySeed, reference: ScoresBySeed, target: str, general: str) -> dict:
    """Return an entry of `verdicts`: the outcome of every metric, and a sentence on the two main metrics."""
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
    """Return a sentence that interprets the outcomes of a pair together."""
    if matched:
        return {
            BETTER: "For the same gain it forgets less.",
            WORSE: "For the same gain it forgets more.",
            SAME: "It forgets less only because it learns less." if general.word == BETTER else "",
            NOT_A_NUMBER: "",
        }[matched.word]
    if general.word == BETTER and target.word == WORSE:
        return "It gains less and forgets less; use --match target to compare at equal gain."
    return ""


def overall(
    verdicts: list[dict], *, target: str, general: str, base: Outcome, level: float | None, controls: list[dict]
) -> str:
    """Return the sentence on the whole comparison.

    Args:
        verdicts: entries of `compare_pair`, each arm against the reference of its learning rate.
        target: the main target metric.
        general: the main general metric.
        base: outcome of the reference's general metric against the base model's.
        level: share of the largest gain at which the arms were matched; None without matching.
        controls: entries of `compare_pair`, each eaft arm against its constant.
    """
    n = max(outcome["n"] for entry in verdicts for outcome in entry["outcomes"])
    details = f"{n} seeds" if n > 1 else "one seed, so the spread over seeds is unknown"
    where = general
    if level is not None:
        where += " at equal target loss"
        details += f"; every arm interpolated to {level:.0%} of the largest gain"
    arms_by_outcome: dict[str, list[str]] = {}
    for entry in verdicts:
        arms_by_outcome.setdefault(_outcome_text(entry, target, general, level is not None), []).append(
            entry["pair"][0]
        )
    clauses = "; ".join(f"{_listed(labels)}: {outcome}" for outcome, labels in arms_by_outcome.items())
    references = _listed(list(dict.fromkeys(entry["pair"][1] for entry in verdicts)))
    text = f"Against {references}, {where} ({details}): {clauses}."
    for entry in controls:
        outcome = _outcome_text(entry, target, general, level is not None)
        text += (
            f" Against {entry['pair'][1]}, which weights every token by the mean gate, {entry['pair'][0]}: {outcome}."
        )
    if base.word not in (WORSE, NOT_A_NUMBER):
        text += (
            f" {references} itself shows no forgetting beyond the spread ({base.text}), so a gate could prevent little."
        )
    return text


def _outcome_text(entry: dict, target: str, general: str, is_matched: bool) -> str:
    words = {outcome["metric"]: outcome["word"] for outcome in entry["outcomes"]}
    if is_matched:
        matched = {outcome["metric"]: outcome["word"] for outcome in entry["matched"]}
        if general not in matched:
            return "not matched to an equal target loss"
        if matched[general] == SAME and words[general] == BETTER:
            return f"{SAME} (less is forgotten only because less is learned)"
        return {BETTER: "less is forgotten", WORSE: "more is forgotten"}.get(matched[general], matched[general])
    if words[general] == BETTER and words[target] == WORSE:
        return "less is forgotten and less gained (use --match target to compare at equal gain)"
    return {BETTER: "less is forgotten, no less gained", WORSE: "more is forgotten"}.get(words[general], words[general])


def _number(value: float, kind: str) -> str:
    """Format with two significant digits: differences may be far smaller than the values."""
    return f"{100 * value:.2g} points" if kind == "share" else f"{value:.2g}"


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
