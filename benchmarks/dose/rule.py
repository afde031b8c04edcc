"""The decision rule, which LOG.md states in words and which was fixed before any measured run.

Every comparison is paired over seeds and at equal target loss, and a difference is called by the rule of
`eaftdrope compare`: beyond the spread of the seeds (Student's t) and the error of the items, with Holm's correction over
the main shares.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from eaftdrope.compare.verdict import BETTER, SAME, WORSE, Outcome, judge, judge_metrics
from eaftdrope.evaluate import evidence

from . import plan
from .measures import FACTS, TARGET, TEXT, Scores
from .plan import DoseCell
from .results import DoseResults

LEAST_GAIN = 0.9
"""Of plain fine-tuning's gain, as trained; a gate with a smaller one costs too much of the target."""
NOTHING_LOST = 0.02
"""Share of the facts; if plain fine-tuning loses fewer, a gate has nothing to protect."""

WORTH, AGAINST, UNCLEAR = "worth using", "not worth using", "no clear change"


@dataclass(frozen=True)
class ShareVerdict:
    """A gate against plain fine-tuning at one share.

    Attributes:
        inspected: mean share of confident conflicts that `eaftdrope inspect` reports, and its lowest and highest value.
        facts, text: the outcomes at equal target loss; the facts are the outcome that decides.
        gain: of the target as trained, as a share of plain fine-tuning's.
        beats_constant: keeps more facts than the constant in every seed; None without that arm.
        lost: share of the facts that plain fine-tuning loses at equal target loss.
        half: half the width of the interval of the difference over the seeds, in shares; NaN for one seed.
        word: WORTH, AGAINST or UNCLEAR.
        because: what the word rests on.
    """

    share: int
    arm: str
    seeds: int
    inspected: tuple[float, float, float]
    facts: Outcome
    text: Outcome
    gain: float
    beats_constant: bool | None
    lost: float
    half: float
    word: str
    because: str


@dataclass(frozen=True)
class _Pairs:
    """Scores of the seeds of which both arms are at the equal target loss."""

    cells: list[DoseCell]
    matched: list[tuple[Scores, Scores]]
    trained: list[tuple[Scores, Scores]]


def verdicts(results: DoseResults, model: str, kind: str, shares: tuple[int, ...], arm: str) -> list[ShareVerdict]:
    """Judge an arm at every share that has results; Holm's correction is over these shares."""
    found = {}
    for share in shares:
        pairs = _pairs(results, model, kind, share, arm)
        if pairs.cells:
            found[share] = pairs
    facts = judge_metrics({str(s): [(a[FACTS], b[FACTS]) for a, b in pairs.matched] for s, pairs in found.items()})
    return [_verdict(results, share, arm, pairs, facts[str(share)]) for share, pairs in found.items()]


def _pairs(results: DoseResults, model: str, kind: str, share: int, arm: str) -> _Pairs:
    cells, matched, trained = [], [], []
    for seed in plan.SEEDS:
        cell = DoseCell(model, kind, share, seed)
        both = [results.scores(cell, name, equal=True) for name in ("none", arm)]
        if all(both):
            cells.append(cell)
            matched.append(tuple(both))
            trained.append(tuple(results.scores(cell, name) for name in ("none", arm)))
    return _Pairs(cells, matched, trained)


def _verdict(results: DoseResults, share: int, arm: str, pairs: _Pairs, facts: Outcome) -> ShareVerdict:
    base = results.base(pairs.cells[0].model)
    text = judge(TEXT, [(a[TEXT], b[TEXT]) for a, b in pairs.matched])
    gains = [[base[TARGET].value - one[TARGET].value for one in pair] for pair in pairs.trained]
    gain = sum(ours for _, ours in gains) / sum(plain for plain, _ in gains)
    lost = base[FACTS].value - statistics.mean(a[FACTS].value for a, _ in pairs.matched)
    beats = _beats_constant(results, pairs.cells, arm)
    word, because = decide(facts.word, text.word, gain, beats, lost, len(pairs.cells))
    seen = [results.cell(cell)["inspected"]["conflict_share"] for cell in pairs.cells]
    inspected = (statistics.mean(seen), min(seen), max(seen))
    half = _half([b[FACTS].value - a[FACTS].value for a, b in pairs.matched])
    return ShareVerdict(share, arm, len(pairs.cells), inspected, facts, text, gain, beats, lost, half, word, because)


def decide(facts: str, text: str, gain: float, beats: bool | None, lost: float, seeds: int) -> tuple[str, str]:
    """Return the word of the rule, and what it rests on.

    Args:
        facts, text: words of the outcomes at equal target loss.
        beats: whether the constant keeps fewer facts in every seed; None if the arm is not compared with one.
    """
    if seeds < len(plan.SEEDS):
        return UNCLEAR, f"{seeds} of {len(plan.SEEDS)} seeds are measured"
    if facts == WORSE:
        return AGAINST, "fewer facts are kept at equal target loss"
    if gain < LEAST_GAIN:
        return AGAINST, f"its gain on the target is {gain:.0%} of plain fine-tuning's"
    if text == WORSE:
        return AGAINST, "perplexity is worse at equal target loss"
    if facts == SAME:
        return UNCLEAR, "nothing was forgotten" if lost < NOTHING_LOST else "no difference beyond the spread"
    if beats is False:
        return UNCLEAR, "a constant weight keeps as many facts in one of the seeds"
    assert facts == BETTER
    return WORTH, "more facts are kept at equal target loss"


def _beats_constant(results: DoseResults, cells: list[DoseCell], arm: str) -> bool | None:
    if arm == "constant":
        return None
    differences = []
    for cell in cells:
        ours, constant = (results.scores(cell, name, equal=True) for name in (arm, "constant"))
        if constant is not None:
            differences.append(ours[FACTS].value - constant[FACTS].value)
    return all(difference > 0 for difference in differences) if differences else None


def _half(differences: list[float]) -> float:
    """Half the interval of a mean over seeds, at the level of two standard errors and without correction."""
    n = len(differences)
    if n < 2:
        return math.nan
    return evidence.student_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
