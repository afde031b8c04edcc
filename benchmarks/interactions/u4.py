"""U4: TTT-E2E on backbones with rotary embedding, with it dropped, and without it from scratch; window as long as the chunk,
and twice as long. A window shorter than the chunk is not defined: tokens of a chunk must see each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.ttt.toy import task

from .lab import Comparison, Lab, Piece, Reading
from .toy_training import BINS, SIZE, ToyTraining, ceilings, read, reading, sizes, trained

TRAINED, LONGER = "trained length", "four times the trained length"
_LONGER, _LONG_TEST = 4, 11


def trainings(steps: int) -> list[ToyTraining]:
    found = []
    for window in (16, 32):
        for rotation in ("rope", "drope", "nope"):
            # the toy's own arm, whose weights may be there already
            name = "first" if (window, rotation) == (16, "rope") else f"{rotation}-window{window}"
            found.append(ToyTraining(name, steps, {"horizon": 1, "window": window}, rotation=rotation))
    return found


def arm_of(training: ToyTraining) -> str:
    return f"{training.rotation}, window {training.ttt['window']}"


def lab(quick: bool) -> Lab:
    steps, seeds, count = sizes(quick)
    pieces = [
        Piece(arm_of(one), seed, one.settings | {"test": count}, _measure(one, seed, count))
        for seed in seeds
        for one in trainings(steps)
    ]
    compared = [
        Comparison(
            f"{rotation} minus rope, window {window}, {at}",
            (f"{rotation}, window {window}", at),
            (f"rope, window {window}", at),
            0.01,
        )
        for at in (TRAINED, LONGER)
        for window in (16, 32)
        for rotation in ("drope", "nope")
    ]
    return Lab(
        "u4",
        "U4: TTT-E2E with RoPE, DroPE and NoPE backbones",
        f"{SIZE} Windows of 16 and 32; DroPE: the last fifth of the steps without rotation.",
        "nats per token",
        BINS,
        pieces,
        compared,
        ceilings(count),
    )


def _measure(training: ToyTraining, seed: int, count: int):
    def measure(weights: Path) -> dict[str, Reading]:
        model = trained(training, seed, weights)
        long_BT = task.draw(np.random.default_rng([_LONG_TEST]), max(2, count // _LONGER), _LONGER * task.LENGTH)
        # beyond the trained length only
        return {
            TRAINED: Reading(reading(read(model, task.test_sequences(count))).values),
            LONGER: reading(read(model, long_BT), task.LENGTH),
        }

    return measure
