"""U7: EAFT's gate in the outer loss of meta-training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.ttt.toy import task
from benchmarks.ttt.toy.run import with_changes

from .lab import Comparison, Lab, Piece, Reading
from .toy_training import BINS, FIRST, SIZE, ToyTraining, ceilings, read, reading, sizes, trained

ON, OFF, LATE = "TTT on", "TTT off", "TTT on, second half"
# DFT is the control that weights likely labels up
GATES = ("none", "eaft", "dft")


def lab(quick: bool) -> Lab:
    steps, seeds, count = sizes(quick)
    plain = replace(FIRST, steps=steps)
    trainings = {g: plain if g == "none" else replace(plain, name=f"outer-{g}", outer_gate=g) for g in GATES}
    pieces = [
        Piece(gate, seed, training.settings | {"test": count}, _measure(training, seed, count))
        for seed in seeds
        for gate, training in trainings.items()
    ]
    compared = [
        Comparison(f"outer gate {gate} minus none: {reading_name}", (gate, reading_name), ("none", reading_name), 0.01)
        for gate in GATES[1:]
        for reading_name in (ON, LATE)
    ]
    return Lab(
        "u7",
        "U7: a gate in the outer loss of meta-training",
        SIZE,
        "nats per token",
        BINS,
        pieces,
        compared,
        ceilings(count),
    )


def _measure(training: ToyTraining, seed: int, count: int):
    def measure(weights: Path) -> dict[str, Reading]:
        model, test_BT = trained(training, seed, weights), task.test_sequences(count)
        on_BT = read(model, test_BT)
        off_BT = read(with_changes(model, lr=0.0), test_BT)
        return {ON: reading(on_BT), LATE: Reading(reading(on_BT, task.LENGTH // 2).values), OFF: reading(off_BT)}

    return measure
