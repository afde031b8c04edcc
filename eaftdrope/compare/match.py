"""Retention at equal target gain: a gate that learns less forgets less, so every arm is drawn back towards the base model
until it has gained as much as the one that gained least.

The line between the two is that of ../trainer/line.py, in float32; share is its a.

    level      of the arms of one seed and learning rate that take part, the highest final held-out loss
    share      the smallest a whose held-out loss is the level: looked for at 1/4, 1/2, 3/4 and 1, then between two of them
    tolerance  a hundredth of the gain (base minus level), or a tenth of its standard error where that is less

An arm takes part when its held-out loss is below the base model's by more than two standard errors of the change, and it has
gained at least a quarter of what the best has: at a lower level nobody would have forgotten much. Others are left out, and
named. Where the loss rises somewhere on the way by more than the tolerance, the arm is said not to be monotone.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eaftdrope.checkpoints.interpolate import adapter_line, full_line
from eaftdrope.evaluate.scores import change_stderr, verdict
from eaftdrope.run.machine import weights_dtype

from .arms import Arm
from .measuring import Bench, Start
from .store import Scores

if TYPE_CHECKING:
    from torch import nn

    from eaftdrope.evaluate import Score

GRID = (0.25, 0.5, 0.75)
OF_GAIN, OF_ERROR = 0.01, 0.1
LEAST_GAIN = 0.25
_TRIES = 30


@dataclass(frozen=True)
class Level:
    """What the arms of one seed and learning rate are brought to, in nats a token."""

    seed: int
    learning_rate: float
    base: float
    level: float
    tolerance: float
    weakest: str
    of_largest_gain: float


@dataclass(frozen=True)
class Found:
    """Where a line first comes down to a level. `share` is None where it never does."""

    share: float | None
    loss: float | None
    monotone: bool


def tolerance_of(base: Score, end: Score) -> float:
    """How near to its level a loss must be."""
    gain, error = base.value - end.value, change_stderr(base, end)
    return OF_GAIN * gain if error is None else min(OF_GAIN * gain, OF_ERROR * error)


def find_share(loss: Callable[[float], float], level: float, tolerance: float) -> Found:
    """The smallest share on the grid's way down whose loss is `level` within `tolerance`.

    Args:
        loss: of a share between 0 and 1; called with 0, the grid and 1, and with shares between two of them.
    """
    line = [(share, loss(share)) for share in (0.0, *GRID, 1.0)]
    monotone = all(after <= before + tolerance for (_, before), (_, after) in itertools.pairwise(line))
    first = next((i for i, (_, value) in enumerate(line) if value <= level + tolerance), None)
    if first is None:
        return Found(None, None, monotone)
    share, value = line[first]
    if first == 0 or value >= level - tolerance:
        return Found(share, value, monotone)
    # regula falsi; an end that stays twice is given half its weight (Illinois), so that both ends come near
    (low, above), (high, below) = line[first - 1], line[first]
    above, below = above - level, below - level
    moved = None
    for _ in range(_TRIES):
        share = high - below * (high - low) / (below - above)
        difference = loss(share) - level
        if abs(difference) <= tolerance:
            return Found(share, level + difference, monotone)
        if difference > 0:
            low, above, below = share, difference, below / (2 if moved == "low" else 1)
            moved = "low"
        else:
            high, below, above = share, difference, above / (2 if moved == "high" else 1)
            moved = "high"
    return Found(None, None, monotone)


def match(bench: Bench, started: Start, changed: Callable[[], None]) -> dict:
    """Brings the arms to their levels, and measures the general probes there; returns `matched` of compare.json.

    Every arm is measured already. What was found before is read, so a second call measures nothing.
    """
    plan = bench.plan
    lines = {arm: _Line(bench, arm, started, changed) for arm in plan.arms}
    levels, matched, left_out = [], [], []
    for seed, rate in dict.fromkeys((arm.seed, arm.learning_rate) for arm in plan.arms):
        arms = [arm for arm in plan.arms if (arm.seed, arm.learning_rate) == (seed, rate)]
        ends = {arm: (lines[arm].score(0.0), lines[arm].score(1.0)) for arm in arms}
        reasons = why_not(ends)
        left_out += [_left_out(arm, why) for arm, why in reasons.items()]
        taking_part = [arm for arm in arms if arm not in reasons]
        if len(taking_part) < 2:
            continue
        level = level_of({arm: ends[arm] for arm in taking_part})
        levels.append(level)
        for arm in taking_part:
            found = find_share(lines[arm].loss, level.level, level.tolerance)
            if found.share is None:
                left_out.append(_left_out(arm, "does not come to the level on its way from the base model"))
            else:
                matched.append((arm, found, lines[arm].scores(found.share)))
            lines[arm].close()
    return _as_json(levels, matched, left_out)


def why_not(ends: dict[Arm, tuple[Score, Score]]) -> dict[Arm, str]:
    """The arms that do not take part, with the reason.

    Args:
        ends: held-out loss of the base model and of the arm.
    """
    gains = {arm: base.value - end.value for arm, (base, end) in ends.items()}
    # NaN is neither more nor less than anything
    best = max(gains, key=lambda arm: gains[arm] if math.isfinite(gains[arm]) else -math.inf)
    reasons = {}
    for arm, (base, end) in ends.items():
        if not math.isfinite(gains[arm]):
            reasons[arm] = "has a target loss that is not a number"
        elif verdict(base, end) != "better":
            reasons[arm] = "has gained nothing on the target"
        elif gains[arm] < LEAST_GAIN * gains[best]:
            reasons[arm] = (
                f"has gained {gains[arm] / gains[best]:.0%} of what {best.label} has, too little to compare at"
            )
    return reasons


def level_of(ends: dict[Arm, tuple[Score, Score]]) -> Level:
    """The level of arms that take part, of one seed and learning rate."""
    weakest = max(ends, key=lambda arm: ends[arm][1].value)
    base, end = ends[weakest]
    largest = base.value - min(score.value for _, score in ends.values())
    share = (base.value - end.value) / largest
    seed, rate = weakest.seed, weakest.learning_rate
    return Level(seed, rate, base.value, end.value, tolerance_of(base, end), weakest.label, share)


def _left_out(arm: Arm, why: str) -> dict:
    return {"label": arm.label, "seed": arm.seed, "why": why}


def _as_json(levels: list[Level], matched: list[tuple[Arm, Found, list[Score]]], left_out: list[dict]) -> dict:
    return {
        # one number for readers; the levels of seeds differ
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


class _Line:
    """The models between the base and an arm; weights are read when something is to be measured."""

    def __init__(self, bench: Bench, arm: Arm, started: Start, changed: Callable[[], None]):
        self._bench, self._arm, self._started, self._changed = bench, arm, started, changed
        self._kept: Scores = bench.scores(arm)
        self._move: Callable[[float], nn.Module] | None = None
        # saved in float32, the ends are the models that were measured
        self._ends_are_known = weights_dtype(bench.plan.recipe.model.dtype) == "float32"
        self._loss = next(key for key, probe in bench.probes.items() if probe.name == "held_out_loss")
        self._general = [key for key, probe in bench.probes.items() if probe.group == "general"]

    def score(self, share: float) -> Score:
        """Held-out loss."""
        return self._measured(self._loss, share)[0]

    def loss(self, share: float) -> float:
        return self.score(share).value

    def scores(self, share: float) -> list[Score]:
        """Held-out loss and what the general probes say."""
        return [score for key in (self._loss, *self._general) for score in self._measured(key, share)]

    def close(self) -> None:
        if self._move is not None:
            self._move = None
            gc.collect()

    def _measured(self, key: str, share: float) -> list[Score]:
        if self._ends_are_known and share in (0.0, 1.0):
            return (self._bench.scores(None) if share == 0.0 else self._kept).get(key)
        scores = self._kept.get(key, share)
        if scores is None:
            self._move = self._move or line_between(self._bench, self._arm)
            model = self._move(share)
            name = self._bench.probes[key].name
            progress = self._started(f"matching {self._arm.name} at {share:.3f} of its way: {name}")
            scores = self._bench.run(model, key, progress)
            self._kept.put(key, scores, share)
            self._changed()
        return scores


def line_between(bench: Bench, arm: Arm) -> Callable[[float], nn.Module]:
    """A function that gives the model at a share of the way from the base to the arm: always the same object."""
    model = bench.load(arm, dtype="float32")
    if bench.plan.recipe.lora:
        return adapter_line(model)
    base = bench.load(None, dtype="float32")
    return full_line(model, {name: weight.detach().to("cpu") for name, weight in base.named_parameters()})
