"""A probe's score with its standard error, and the standard error of a change between two runs of the same probe.

A probe measures units (rows, windows of text, questions). Unit i contributes (t_i, w_i): nats and tokens for a loss, 0
or 1 and 1 for a share. The mean is m = sum t / sum w, and there are three kinds of value:

    mean    m                 stderr: ratio estimator, sqrt(n / (n - 1) * sum (t_i - m w_i)^2) / sum w
    exp     exp(m)            stderr: the same, times exp(m) (delta method): perplexity
    share   m, w = 1          stderr: sqrt(p (1 - p) / (n + 4)) with p = (hits + 2) / (n + 4)

The plain binomial sqrt(m (1 - m) / n) is 0 for 0 of 12, which would make any change certain; two more hits and two more
misses (Agresti and Coull, The American Statistician 52, 1998) correct this at both ends.

Before and after cover the same units, so the error of the change is computed over the units' differences (a perplexity
that rises a little in every window has risen). For shares, one gain and one loss are added for the same reason (Bonett
and Price, Journal of Educational and Behavioral Statistics 37, 2012).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eaftdrope.errors import UserError

KINDS = ("mean", "exp", "share")
NOT_A_NUMBER = "not a number"
ENOUGH = 100
"""`Score.least` of the probes of behaviour: with fewer prompts one answer more or less is a change of over a point."""
# Relative rounding of a float32 sum over some hundred tokens: equal rows differ by this in batches of other widths.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Score:
    """A probe's value.

    Attributes:
        probe, group, metric: what was measured; group is "target" or "general".
        value: in the metric's own unit (nats per token, perplexity, share between 0 and 1).
        stderr: standard error of `value`; None for fewer than two units or a value that is not finite; 0 if all units
            are equal, which does not mean certainty: it is never shown as ± 0.
        n: number of units.
        better: "lower" or "higher".
        kind: "mean", "exp" or "share" (see the module).
        units: (total, weight) of every unit, in a fixed order, for paired comparisons.
        least: number of units below which a change has no verdict.
    """

    probe: str
    group: str
    metric: str
    value: float
    stderr: float | None
    n: int
    better: str
    kind: str = "mean"
    units: tuple[tuple[float, float], ...] = ()
    least: int = 0


def score_units(
    probe: str, group: str, metric: str, units: list[tuple[float, float]], *, kind: str, better: str, least: int = 0
) -> Score:
    """Return the Score of a probe from its units' (total, weight)."""
    assert kind in KINDS and better in ("lower", "higher") and units
    mean = _mean(units)
    stderr = None
    if kind == "share":
        p = _mean([*units, (0.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0)])
        stderr = math.sqrt(p * (1 - p) / (len(units) + 4))
    elif len(units) > 1 and math.isfinite(mean):
        stderr = _ratio_stderr([total - mean * weight for total, weight in units], units)
    value = mean
    if kind == "exp":
        value = _exp(mean)
        stderr = value * stderr if stderr is not None and math.isfinite(value) else None
    return Score(probe, group, metric, value, stderr, len(units), better, kind, tuple(units), least)


def change_stderr(before: Score, after: Score) -> float | None:
    """Return the standard error of `after.value - before.value`: paired if both have the same units, else independent.

    None if it is unknown, or a value is not finite.
    """
    if before.stderr is None or after.stderr is None or not math.isfinite(after.value - before.value):
        return None
    weights = [weight for _, weight in before.units]
    if not weights or weights != [weight for _, weight in after.units]:
        return math.hypot(before.stderr, after.stderr)
    if before.kind == "share":
        differences = [a - b for (b, _), (a, _) in zip(before.units, after.units)] + [1.0, -1.0]
        mean = sum(differences) / len(differences)
        return math.sqrt(sum((d - mean) ** 2 for d in differences)) / len(differences)
    residuals = [a - b for a, b in zip(_residuals(after), _residuals(before))]
    return _ratio_stderr(residuals, before.units)


def refuse_not_a_number(scores: Sequence[Score], model: str) -> None:
    """Refuse scores before training that are not finite: no later score could be compared with them.

    Raises:
        UserError: with the metrics that are NaN or infinite.
    """
    bad = [score.metric for score in scores if not math.isfinite(score.value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} of {model} is NaN or infinite before any training: no change could be measured, and the "
            "trained model would not be finite either. Its activations overflow: set train.precision to float32, or use "
            "another model."
        )


def scores_to_json(scores: list[Score]) -> str:
    """Return scores as a JSON list; `scores_from_json` restores equal scores."""
    return json.dumps([asdict(score) for score in scores])


def scores_from_json(text: str) -> list[Score]:
    """Return the scores that `scores_to_json` wrote."""
    return scores_from_dicts(json.loads(text))


def scores_from_dicts(rows: list[dict[str, Any]]) -> list[Score]:
    """Return scores from their `asdict`, which may have been through JSON."""
    scores = []
    for row in rows:
        fields: dict[str, Any] = {**row, "units": tuple((total, weight) for total, weight in row["units"])}
        scores.append(Score(**fields))
    return scores


def _mean(units: Sequence[tuple[float, float]]) -> float:
    totals = [total for total, _ in units]
    # fsum raises on infinities of both signs
    total = math.fsum(totals) if all(map(math.isfinite, totals)) else sum(totals)
    return total / math.fsum(weight for _, weight in units)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _residuals(score: Score) -> list[float]:
    """Return each unit's first-order contribution to the value, times the total weight."""
    mean = _mean(score.units)
    slope = score.value if score.kind == "exp" else 1.0
    return [slope * (total - mean * weight) for total, weight in score.units]


def _ratio_stderr(residuals: list[float], units: Sequence[tuple[float, float]]) -> float:
    """Return the ratio estimator's standard error; 0 if the residuals are 0 up to rounding (`error_text` then shows none)."""
    n = len(residuals)
    if max(map(abs, residuals)) <= _ROUNDING * max(abs(total) for total, _ in units):
        return 0.0
    spread = math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals))
    return spread / math.fsum(weight for _, weight in units)
