"""Settings, and the tasks of the program in order.

A rate is fitted on passages held out from the training text, never on the test text. Later tasks depend on earlier
results (the fitted rate), so the plan is a generator that reads the results so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .document import Document

MODEL = "package:smollm2-135m-instruct"
WINDOW, SINK, CHUNK, FAST_BLOCKS = 256, 4, 128, 8
# how a training reads, and its inner rate: the one that fits the original best, on the fit passages
TRAINED = {
    "meta": ("prime", 0.3),
    "meta_in_place": ("in_place", 0.1),
    "meta_muon": ("muon", 3.0),
    "control": ("sink", 0.0),
}
GRID = (0.3, 0.1, 1.0)
LADDER = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WARMUP = 4
SEEDS = (42, 43, 44)
SHORT, LONG = 1200, 7200
ORIGINAL = "original"
LEARNING = ("prime", "in_place", "warmup", "muon", "muon_warmup")
GAPS = (100, 500)
EQUAL = ("tokens", "time")
PARTS = ("untrained", "short", "passkey", "long")


@dataclass(frozen=True)
class Evaluate:
    """Loss by position. `weights`: `original`, or a training and its number of rows (`meta-1200-42@160`).
    `reads`: full, window, sink, or how it learns: one of `LEARNING`."""

    weights: str
    reads: str
    rate: float
    text: str

    @property
    def key(self) -> str:
        return f"{self.weights} {self.reads} {self.rate:g} {self.text}"


@dataclass(frozen=True)
class PassKey:
    weights: str
    reads: str
    rate: float
    gap: int

    @property
    def key(self) -> str:
        return f"{self.weights} {self.reads} {self.rate:g} gap {self.gap}"


@dataclass(frozen=True)
class Train:
    """`arm`: one of `TRAINED`, for `budget` CPU seconds."""

    arm: str
    budget: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.arm}-{self.budget}-{self.seed}"


Task = Evaluate | PassKey | Train


def tasks(found: Document, parts: tuple[str, ...]) -> Iterator[Task]:
    """Yield the tasks in order, the finished ones too. The caller stores the result of each before the next."""
    for part in parts:
        if part == "untrained":
            yield from _untrained(found)
        elif part == "passkey":
            yield from _pass_key(found)
        else:
            yield from _trained(found, SHORT if part == "short" else LONG, SEEDS if part == "short" else SEEDS[:1])


def _untrained(found: Document) -> Iterator[Task]:
    for reads in ("full", "window", "sink"):
        yield Evaluate(ORIGINAL, reads, 0.0, "test")
    for reads in LEARNING:
        yield from _fitted(found, ORIGINAL, reads)


def _trained(found: Document, budget: int, seeds: tuple[int, ...]) -> Iterator[Task]:
    first = seeds[0]
    for seed in seeds:
        meta, control = Train("meta", budget, seed), Train("control", budget, seed)
        yield meta
        yield as_trained(found, meta)
        yield control
        yield Evaluate(found.weights(meta), "sink", 0.0, "test")
        for equal in EQUAL:
            weights = found.control(budget, seed, equal)
            yield Evaluate(weights, "sink", 0.0, "test")
            yield from _fitted(found, weights, "prime", fit_on=found.control(budget, first, equal))
    yield from _fitted(found, found.weights(Train("meta", budget, first)), "prime")
    if budget == SHORT:
        for arm in ("meta_in_place", "meta_muon"):
            training = Train(arm, budget, first)
            yield training
            yield as_trained(found, training)


def as_trained(found: Document, training: Train) -> Evaluate:
    """The test measurement of a finished training, read as it was trained."""
    return Evaluate(found.weights(training), *TRAINED[training.arm], "test")


def _fitted(found: Document, weights: str, reads: str, fit_on: str | None = None) -> Iterator[Task]:
    """Fit the rate: the grid, extended until the best is inside; then measure it on the test text.

    Seeds share a rate, which is fitted on the first seed's weights (`fit_on`).
    """
    fit_on = fit_on or weights
    for rate in GRID:
        yield Evaluate(fit_on, reads, rate, "fit")
    while (rate := _next_rate(found.fit(fit_on, reads))) is not None:
        yield Evaluate(fit_on, reads, rate, "fit")
    yield Evaluate(weights, reads, best(found.fit(fit_on, reads)), "test")


def _next_rate(losses: dict[float, float]) -> float | None:
    """Return the next rate of the ladder outside the measured ones if the best is at their edge."""
    least, place = best(losses), LADDER.index(best(losses))
    if least == min(losses) and place > 0:
        return LADDER[place - 1]
    if least == max(losses) and place + 1 < len(LADDER):
        return LADDER[place + 1]
    return None


def best(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def _pass_key(found: Document) -> Iterator[Task]:
    arms = [(ORIGINAL, "full", 0.0), (ORIGINAL, "sink", 0.0)]
    for reads in ("prime", "muon"):
        yield from _fitted(found, ORIGINAL, reads)
        arms.append((ORIGINAL, reads, best(found.fit(ORIGINAL, reads))))
    for budget in (SHORT, LONG):
        meta = Train("meta", budget, SEEDS[0])
        if found.has(meta):
            arms.append((found.weights(meta), *TRAINED["meta"]))
    for weights, reads, rate in arms:
        for gap in GAPS:
            yield PassKey(weights, reads, rate, gap)
