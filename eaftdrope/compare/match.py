"""Retention at equal target gain. A gate that learns less forgets less, so the weights of every arm are interpolated towards
the base model until its gain equals that of the arm that gained least.

The interpolation is that of checkpoints/interpolate.py, in float32; `share` is its parameter.

    level      the highest final held-out loss of the participating arms of one seed and learning rate
    share      the smallest share whose held-out loss is the level: searched at 1/4, 1/2, 3/4 and 1, then between two of them
    tolerance  a hundredth of the gain (base minus level), or a tenth of its standard error if that is smaller

An arm participates if its held-out loss is below the base model's by more than two standard errors of the change, and its
gain is at least a quarter of the largest: at a lower level no arm would have forgotten much. The other arms are listed with
the reason. An arm whose loss rises by more than the tolerance between two points is reported as not monotone.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eaftdrope.checkpoints.interpolate import adapter_line, full_line
from eaftdrope.evaluate.scores import change_stderr
from eaftdrope.evaluate.verdicts import BETTER, judge_change
from eaftdrope.run.machine import weights_dtype

from .measurement import Measurement, StartProgress
from .plan import Arm
from .stored_scores import StoredScores

if TYPE_CHECKING:
    from torch import nn

    from eaftdrope.evaluate import Score

GRID = (0.25, 0.5, 0.75)
OF_GAIN, OF_ERROR = 0.01, 0.1
LEAST_GAIN = 0.25
_TRIES = 30


@dataclass(frozen=True)
class TargetLevel:
    """The target loss of the arms of one seed and learning rate, in nats per token."""

    seed: int
    learning_rate: float
    base: float
    level: float
    tolerance: float
    weakest: str
    of_largest_gain: float


@dataclass(frozen=True)
class MatchedShare:
    """The first share at which the loss reaches a level; `share` is None if it never does."""

    share: float | None
    loss: float | None
    monotone: bool


def tolerance_of(base: Score, end: Score) -> float:
    """Return the largest permitted distance of a loss from its level."""
    gain, error = base.value - end.value, change_stderr(base, end)
    return OF_GAIN * gain if error is None else min(OF_GAIN * gain, OF_ERROR * error)


def find_share(loss: Callable[[float], float], level: float, tolerance: float) -> MatchedShare:
    """Find the smallest share whose loss is `level` within `tolerance`.

    Args:
        loss: share between 0 and 1 -> held-out loss; called at 0, the grid and 1, then between two of them.
    """
    line = [(share, loss(share)) for share in (0.0, *GRID, 1.0)]
    monotone = all(after <= before + tolerance for (_, before), (_, after) in itertools.pairwise(line))
    first = next((i for i, (_, value) in enumerate(line) if value <= level + tolerance), None)
    if first is None:
        return MatchedShare(None, None, monotone)
    share, value = line[first]
    if first == 0 or value >= level - tolerance:
        return MatchedShare(share, value, monotone)
    # regula falsi; halving the weight of an end that stays twice (Illinois) makes both ends converge
    (low, above), (high, below) = line[first - 1], line[first]
    above, below = above - level, below - level
    moved = None
    for _ in range(_TRIES):
        share = high - below * (high - low) / (below - above)
        difference = loss(share) - level
        if abs(difference) <= tolerance:
            return MatchedShare(share, level + difference, monotone)
        if difference > 0:
            low, above, below = share, difference, below / (2 if moved == "low" else 1)
            moved = "low"
        else:
            high, below, above = share, difference, above / (2 if moved == "high" else 1)
            moved = "high"
    return MatchedShare(None, None, monotone)


def match(measurement: Measurement, started: StartProgress, changed: Callable[[], object]) -> dict:
    """Bring the arms to their levels and measure the general probes there; return `matched` of compare.json.

    Every arm must have been measured. Stored scores are reused, so a second call measures nothing. `started` and
    `changed` are as in [`measure`].
    """
    plan = measurement.plan
    lines = {arm: _Interpolation(measurement, arm, started, changed) for arm in plan.arms}
    levels, matched, left_out = [], [], []
    for seed, rate in dict.fromkeys((arm.seed, arm.base_rate) for arm in plan.arms):
        arms = [arm for arm in plan.arms if (arm.seed, arm.base_rate) == (seed, rate)]
        ends = {arm: (lines[arm].score(0.0), lines[arm].score(1.0)) for arm in arms}
        reasons = left_out_reasons(ends)
        left_out += [_left_out(arm, why) for arm, why in reasons.items()]
        participating = [arm for arm in arms if arm not in reasons]
        if len(participating) < 2:
            continue
        level = level_of({arm: ends[arm] for arm in participating})
        levels.append(level)
        for arm in participating:
            found = find_share(lines[arm].loss, level.level, level.tolerance)
            if found.share is None:
                left_out.append(
                    _left_out(arm, "does not reach the level between the base model and its trained weights")
                )
            else:
                matched.append((arm, found, lines[arm].scores(found.share)))
            lines[arm].close()
    return _as_json(levels, matched, left_out)


def left_out_reasons(ends: dict[Arm, tuple[Score, Score]]) -> dict[Arm, str]:
    """Return the arms that do not participate, with the reason.

    Args:
        ends: arm -> held-out loss of the base model and of the arm.
    """
    gains = {arm: base.value - end.value for arm, (base, end) in ends.items()}
    # NaN compares false with every number
    best = max(gains, key=lambda arm: gains[arm] if math.isfinite(gains[arm]) else -math.inf)
    reasons = {}
    for arm, (base, end) in ends.items():
        if not math.isfinite(gains[arm]):
            reasons[arm] = "its target loss is not a number"
        elif judge_change(base, end).word != BETTER:
            reasons[arm] = "no clear gain on the target"
        elif gains[arm] < LEAST_GAIN * gains[best]:
            reasons[arm] = (
                f"its gain is {gains[arm] / gains[best]:.0%} of that of {best.label}, too little for a comparison"
            )
    return reasons


def level_of(ends: dict[Arm, tuple[Score, Score]]) -> TargetLevel:
    """Return the level of the participating arms of one seed and learning rate."""
    weakest = max(ends, key=lambda arm: ends[arm][1].value)
    base, end = ends[weakest]
    largest = base.value - min(score.value for _, score in ends.values())
    share = (base.value - end.value) / largest
    seed, rate = weakest.seed, weakest.base_rate
    return TargetLevel(seed, rate, base.value, end.value, tolerance_of(base, end), weakest.label, share)


def _left_out(arm: Arm, why: str) -> dict:
    return {"label": arm.label, "seed": arm.seed, "why": why}


def _as_json(
    levels: list[TargetLevel], matched: list[tuple[Arm, MatchedShare, list[Score]]], left_out: list[dict]
) -> dict:
    return {
        # a summary for readers; the levels differ by seed
        "level": sum(level.level for level in levels) / len(levels) if levels else None,
        "levels": [asdict(level) for level in levels],
        "arms": [
            {
                "label": arm.label,
                "seed": arm.seed,
                "share": found.share,
                "loss": found.loss,
                "monotone": found.monotone,
                "scores": [asdict(score) for score in scores],
            }
            for arm, found, scores in matched
        ],
        "left_out": left_out,
    }


class _Interpolation:
    """The models between the base and an arm; weights are loaded on the first measurement."""

    def __init__(
        self, measurement: Measurement, arm: Arm, started: StartProgress, changed: Callable[[], object]
    ) -> None:
        self._measurement, self._arm, self._started, self._changed = measurement, arm, started, changed
        self._kept: StoredScores = measurement.scores(arm)
        self._move: Callable[[float], nn.Module] | None = None
        # models saved in float32 are exactly the ends, which have been measured
        self._ends_are_known = weights_dtype(measurement.plan.recipe.model.dtype) == "float32"
        self._loss = next(key for key, probe in measurement.probes.items() if probe.name == "held_out_loss")
        self._general = [key for key, probe in measurement.probes.items() if probe.group == "general"]

    def score(self, share: float) -> Score:
        """Return the score of the held-out loss."""
        return self._measured(self._loss, share)[0]

    def loss(self, share: float) -> float:
        """Return the held-out loss."""
        return self.score(share).value

    def scores(self, share: float) -> list[Score]:
        """Return the scores of the held-out loss and of the general probes."""
        return [score for key in (self._loss, *self._general) for score in self._measured(key, share)]

    def close(self) -> None:
        """Release the weights."""
        if self._move is not None:
            self._move = None
            gc.collect()

    def _measured(self, key: str, share: float) -> list[Score]:
        if self._ends_are_known and share in (0.0, 1.0):
            known = (self._measurement.scores(None) if share == 0.0 else self._kept).get(key)
            assert known is not None, "every arm is measured before matching"
            return known
        scores = self._kept.get(key, share)
        if scores is None:
            self._move = self._move or line_between(self._measurement, self._arm)
            model = self._move(share)
            name = self._measurement.probes[key].name
            progress = self._started(f"matching {self._arm.name} at share {share:.3f}: {name}")
            scores = self._measurement.run(model, key, progress)
            self._kept.put(key, scores, share)
            self._changed()
        return scores


def line_between(measurement: Measurement, arm: Arm) -> Callable[[float], nn.Module]:
    """Return a function share -> model between the base (0) and the arm (1); it is always the same model object."""
    model = measurement.load(arm, dtype="float32")
    if measurement.plan.recipe.lora:
        return adapter_line(model)
    base = measurement.load(None, dtype="float32")
    return full_line(model, {name: weight.detach().to("cpu") for name, weight in base.named_parameters()})
