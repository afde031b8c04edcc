"""The verdict of a comparison, by one rule that was fixed before any result.

Two arms are compared seed by seed: d_k is the difference of a metric under seed k, both trained on the same rows in the same
order. A difference is called better or worse if its mean is beyond both

    the seeds    t * sd(d) / sqrt(n)                t: Student's with n - 1 degrees of freedom (4.5 for three seeds)
    the items    z * mean of the probe's own paired standard errors       (rows, questions or windows, `change_stderr`)

and anything else is "no difference beyond the spread", with the seeds, and the items, that it would need. The first tests
whether another seed would give the same result, the second whether other rows or questions would. One seed has no spread:
only the second applies, and the sentence states it.

t and z are those of evaluate/evidence.py: z is 2 for one metric, and both grow with the number of metrics of a pair of arms
(Holm's correction). Pairs of arms are not corrected for: with many arms, some differences are still called by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eaftdrope.evaluate import evidence
from eaftdrope.evaluate.scores import NOT_A_NUMBER, change_stderr

if TYPE_CHECKING:
    from eaftdrope.evaluate import Score

BETTER, WORSE, SAME = "better", "worse", "no difference beyond the spread"


@dataclass(frozen=True)
class Outcome:
    """The difference of two arms in one metric.

    Attributes:
        difference: mean over `n` seeds.
        margin: what it must exceed; None if the probe has one item, so that its error is unknown, or fewer than it requires.
        needs: the study in which the difference would be beyond its margin, such as "about 9 seeds", or the items that the
            probe requires; "" if it is beyond, or if no study is large enough.
    """

    metric: str
    kind: str
    difference: float
    margin: float | None
    n: int
    word: str
    needs: str = ""

    @property
    def text(self) -> str:
        """The outcome as text, such as `better (-1.23, beyond 0.45)`."""
        if self.word == NOT_A_NUMBER:
            return self.word
        difference = ("+" if self.difference > 0 else "") + _number(self.difference, self.kind)
        if self.margin is None:
            return f"{self.word} ({difference}; {f'{self.needs} needed' if self.needs else 'one item has no error'})"
        if self.margin == 0:
            # no measurement is certain, so ± 0 is not shown
            return f"{self.word} ({difference}, the same in every item)"
        beyond = "not beyond" if self.word == SAME else "beyond"
        needs = f"; {self.needs} needed" if self.needs else ""
        return f"{self.word} ({difference}, {beyond} {_number(self.margin, self.kind)}{needs})"


@dataclass(frozen=True)
class ScoresBySeed:
    """The scores of an arm: seed -> metric -> score, and the same at equal target gain if measured."""

    label: str
    scores: dict[int, dict[str, Score]]
    matched: dict[int, dict[str, Score]]


@dataclass(frozen=True)
class _Spread:
    """The differences of a metric: their mean over `n` seeds, standard deviation, and mean error over `items` items (None:
    unknown)."""

    mean: float
    sd: float
    error: float | None
    n: int
    items: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Score, Score]]) -> _Spread:
        differences = [arm.value - reference.value for reference, arm in pairs]
        errors = [change_stderr(reference, arm) for reference, arm in pairs]
        known = [error for error in errors if error is not None]
        error = statistics.mean(known) if len(known) == len(errors) else None
        # an error is only known where every difference is finite
        sd = statistics.stdev(differences) if len(pairs) > 1 and error is not None else 0.0
        return cls(statistics.mean(differences), sd, error, len(pairs), min(arm.n for _, arm in pairs))

    def is_too_small(self, score: Score) -> bool:
        """Return whether the probe has fewer items than it requires for a verdict."""
        return self.items < score.least

    def margins(self, count: int) -> tuple[float, float]:
        """Return the margins of the items and of the seeds (0 for one seed)."""
        assert self.error is not None, "without an error there is no margin"
        seeds = 0.0 if self.n == 1 else evidence.student_quantile(self.n - 1, count) * self.sd / math.sqrt(self.n)
        return evidence.normal_quantile(count) * self.error, seeds

    @property
    def p_value(self) -> float | None:
        """The larger one of the p-values of items and seeds, since a difference must be beyond both; None if unknown."""
        if self.error is None:
            return None
        without_spread = float(self.mean == 0)
        items = evidence.normal_p(self.mean / self.error) if self.error else without_spread
        if self.n == 1:
            return items
        sd = self.sd / math.sqrt(self.n)
        return max(items, evidence.student_p(self.mean / sd, self.n - 1) if sd else without_spread)

    def needs(self, count: int) -> str:
        """Return the study in which the difference would be beyond both margins; "" if none is large enough."""
        items, seeds = self.margins(count)
        parts = []
        if seeds >= abs(self.mean):
            wanted = evidence.seeds_needed(self.mean, self.sd, count)
            parts.append(f"over {evidence.MOST_SEEDS:,} seeds" if wanted is None else f"about {wanted:,} seeds")
        if items >= abs(self.mean):
            wanted = evidence.items_needed(self.items, items, abs(self.mean))
            parts.append("" if wanted is None else f"about {evidence.about(wanted)} items")
        return "" if not all(parts) else " and ".join(parts)


def judge(metric: str, pairs: Sequence[tuple[Score, Score]], count: int = 1) -> Outcome:
    """Judge the differences of one metric by the rule of this module.

    Args:
        pairs: (reference, arm) of each seed; at least one.
        count: divisor of the level (`evidence.holm`).
    """
    spread, score = _Spread.of(pairs), pairs[0][1]
    if not math.isfinite(spread.mean):
        return Outcome(metric, score.kind, spread.mean, None, spread.n, NOT_A_NUMBER)
    if spread.is_too_small(score):
        return Outcome(metric, score.kind, spread.mean, None, spread.n, SAME, f"{score.least:,} items")
    if spread.error is None:
        return Outcome(metric, score.kind, spread.mean, None, spread.n, SAME)
    margin = max(spread.margins(count))
    if abs(spread.mean) <= margin:
        return Outcome(metric, score.kind, spread.mean, margin, spread.n, SAME, spread.needs(count))
    word = BETTER if (spread.mean < 0) == (score.better == "lower") else WORSE
    return Outcome(metric, score.kind, spread.mean, margin, spread.n, word)


def judge_metrics(pairs: dict[str, Sequence[tuple[Score, Score]]]) -> dict[str, Outcome]:
    """Judge every metric of two arms, with Holm's correction over those that can have a verdict.

    Args:
        pairs: metric -> (reference, arm) of each seed.
    """
    spreads = {metric: _Spread.of(found) for metric, found in pairs.items()}
    judged = {metric: one for metric, one in spreads.items() if not one.is_too_small(pairs[metric][0][1])}
    known = {metric: p for metric, one in judged.items() if (p := one.p_value) is not None}
    counts = dict(zip(known, evidence.holm(list(known.values()))))
    return {metric: judge(metric, found, counts.get(metric, 1)) for metric, found in pairs.items()}


def compare_pair(arm: ScoresBySeed, reference: ScoresBySeed, target: str, general: str) -> dict:
    """Return an entry of `verdicts`: the outcome of every metric, and a sentence on the two main metrics."""
    outcomes = _outcomes(reference.scores, arm.scores)
    # the target is equal by construction there, so it is no comparison to correct for
    matched = _outcomes(reference.matched, arm.matched, equal=target)
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


def _outcomes(
    reference: dict[int, dict[str, Score]], arm: dict[int, dict[str, Score]], equal: str = ""
) -> dict[str, Outcome]:
    """Judge the metrics of two arms; one that was made `equal` is judged apart from the others."""
    seeds = [seed for seed in arm if seed in reference]
    if not seeds:
        return {}
    pairs = {metric: [(reference[seed][metric], arm[seed][metric]) for seed in seeds] for metric in arm[seeds[0]]}
    judged = judge_metrics({metric: found for metric, found in pairs.items() if metric != equal})
    return {metric: judged.get(metric) or judge(metric, found) for metric, found in pairs.items()}


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
    metrics = max(len(entry["outcomes"]) if level is None else len(entry["matched"]) - 1 for entry in verdicts)
    if metrics > 1:
        details += f"; Holm's correction over {metrics} metrics"
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
    text += _needs_sentence([*verdicts, *controls], general, level is not None)
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


def _needs_sentence(entries: list[dict], general: str, is_matched: bool) -> str:
    """Return a sentence on the study that each undecided pair would need; "" without one."""
    needs = []
    for entry in entries:
        outcomes = {outcome["metric"]: outcome for outcome in entry["matched" if is_matched else "outcomes"]}
        if general in outcomes and outcomes[general]["needs"]:
            needs.append(f"{' against '.join(entry['pair'])} {outcomes[general]['needs']}")
    return f" A difference as measured would need: {_listed(needs)}." if needs else ""


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
