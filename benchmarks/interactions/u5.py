"""U5: EAFT's gate and its complement in the inner loss, at test and in training, where the text stays as it is and where it
contradicts itself.

Half of the successors of a sequence change at its middle: from then on the model is certain of the old ones, and the labels
disagree. These are the confident conflicts that EAFT's gate closes, and the facts that a reader has to keep.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.ttt.toy import task

from .lab import Comparison, Lab, Piece, Reading
from .toy_training import BINS, FIRST, INNER_GATES, SIZE, ToyTraining, ceilings, read, reading, sizes, trained

STEADY, CHANGED, KEPT = "steady text", "after the change, changed successors", "after the change, kept successors"
_CONTRADICTED = 13
# predictions from here on follow the change by two chunks at least
SETTLED = task.LENGTH // 2 + 32
AT_TEST, IN_TRAINING = "at test", "in training"


def contradicted(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences whose successors of half of the symbols change at the middle `[B, T]`, and these symbols `[B, S]`."""
    random = np.random.default_rng([_CONTRADICTED])
    before_BS, other_BS = random.integers(task.SYMBOLS, size=(2, count, task.SYMBOLS))
    # a shift by 1 to S - 1: never the old successor
    other_BS = (before_BS + 1 + other_BS % (task.SYMBOLS - 1)) % task.SYMBOLS
    changed_BS = random.random((count, task.SYMBOLS)).argsort(1) < task.SYMBOLS // 2
    half = task.LENGTH // 2
    first_BT = task.follow(random, before_BS, half)
    second_BT = task.follow(random, np.where(changed_BS, other_BS, before_BS), half + 1, first_BT[:, -1])
    return np.concatenate([first_BT, second_BT[:, 1:]], 1), changed_BS


def arms(steps: int) -> dict[str, tuple[ToyTraining, str]]:
    """Return arm -> (training, inner gate at test)."""
    plain = replace(FIRST, steps=steps)
    found = {f"{gate} {AT_TEST}": (plain, gate) for gate in INNER_GATES}
    for gate in ("eaft", "complement"):
        found[f"{gate} {IN_TRAINING}"] = (replace(plain, name=f"inner-{gate}", inner_gate=gate), gate)
    return found


def lab(quick: bool) -> Lab:
    steps, seeds, count = sizes(quick)
    pieces = [
        Piece(arm, seed, training.settings | {"gate": gate, "test": count}, _measure(training, gate, seed, count))
        for seed in seeds
        for arm, (training, gate) in arms(steps).items()
    ]
    compared = [
        Comparison(f"{arm} minus none: {text}", (arm, text), (f"none {AT_TEST}", text), 0.01)
        for text in (STEADY, CHANGED, KEPT)
        for arm in arms(steps)
        if not arm.startswith("none")
    ]
    return Lab(
        "u5",
        "U5: the gate and its complement in the inner loss",
        f"{SIZE} Contradicted text: half of the successors change at token {task.LENGTH // 2}.",
        "nats per token",
        BINS,
        pieces,
        compared,
        ceilings(count),
    )


def _measure(training: ToyTraining, gate: str, seed: int, count: int):
    def measure(weights: Path) -> dict[str, Reading]:
        model = gated(trained(training, seed, weights), gate)
        text_BT, changed_BS = contradicted(count)
        nll_BT = read(model, text_BT)
        after_changed_BT = np.take_along_axis(changed_BS, text_BT[:, :-1], 1)
        settled_BT = np.arange(nll_BT.shape[1]) >= SETTLED
        curve = task.by_bin(nll_BT).mean(0).tolist()
        found = {STEADY: reading(read(model, task.test_sequences(count)))}
        for name, chosen_BT in ((CHANGED, after_changed_BT), (KEPT, ~after_changed_BT)):
            inside_BT = chosen_BT & settled_BT
            means = (nll_BT * inside_BT).sum(1) / np.maximum(1, inside_BT.sum(1))
            found[name] = Reading(means.tolist(), curve if name == CHANGED else ())
        return found

    return measure


def gated(model: nn.Module, gate: str) -> nn.Module:
    """Set the inner gate, in place; return the model."""
    model.ttt.config = replace(model.ttt.config, inner_gate=INNER_GATES[gate])
    return model
