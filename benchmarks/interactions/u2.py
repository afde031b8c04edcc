"""U2: does fine-tuning destroy what meta-training built, and does EAFT destroy less of it?

A meta-trained model is fine-tuned on a domain with one fixed successor table, whose best reader needs no memory of the
sequence at all. What remains is measured on the toy's own sequences, each with a table of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.ttt.toy import task
from benchmarks.ttt.toy.run import with_changes

from .lab import Comparison, Lab, Piece, Reading
from .toy_training import BINS, FIRST, SIZE, ToyTraining, ceilings, fit, read, reading, sizes, trained

STEPS, RATE = 60, 1e-3
_DOMAIN = 7
# arm -> (gate of the fine-tuning, primes are frozen)
ARMS = {
    "SFT": ("none", False),
    "EAFT": ("eaft", False),
    "EAFT, primes frozen": ("eaft", True),
    "SFT, primes frozen": ("none", True),
}
BEFORE, ON, GAIN, DOMAIN = "meta-trained", "TTT on", "gain of TTT", "domain, TTT on"


def domain_batch(seed: int, step: int, count: int) -> np.ndarray:
    """Return sequences that all follow the domain's table, `[B, T]`."""
    table_S = np.random.default_rng([_DOMAIN]).integers(task.SYMBOLS, size=task.SYMBOLS)
    return task.follow(np.random.default_rng([_DOMAIN, seed, step]), np.tile(table_S, (count, 1)))


def lab(quick: bool) -> Lab:
    steps, seeds, count = sizes(quick)
    start, tuning = replace(FIRST, steps=steps), 2 if quick else STEPS
    pieces = []
    for seed in seeds:
        for arm in (BEFORE, *ARMS):
            settings = {"start": start.settings, "steps": 0 if arm == BEFORE else tuning, "rate": RATE, "test": count}
            pieces.append(Piece(arm, seed, settings, _measure(arm, start, tuning, seed, count)))
    compared = [
        *(Comparison(f"{arm}: loss with TTT on, after minus before", (arm, ON), (BEFORE, ON), 0.01) for arm in ARMS),
        *(Comparison(f"{arm}: gain of TTT, after minus before", (arm, GAIN), (BEFORE, GAIN), 0.01) for arm in ARMS),
        Comparison("EAFT minus SFT: loss with TTT on", ("EAFT", ON), ("SFT", ON), 0.01),
        Comparison("EAFT minus SFT: loss on the domain", ("EAFT", DOMAIN), ("SFT", DOMAIN), 0.01),
        Comparison(
            "EAFT, frozen primes minus trained: loss with TTT on", ("EAFT, primes frozen", ON), ("EAFT", ON), 0.01
        ),
    ]
    return Lab(
        "u2",
        "U2: what fine-tuning leaves of a meta-trained start",
        f"{SIZE} Fine-tuned for {STEPS} steps at {RATE:g} on sequences of one fixed table.",
        "nats per token",
        BINS,
        pieces,
        compared,
        ceilings(count),
    )


def _measure(arm: str, start: ToyTraining, steps: int, seed: int, count: int):
    def measure(weights: Path) -> dict[str, Reading]:
        model = trained(start, seed, weights)
        if arm != BEFORE:
            gate, frozen = ARMS[arm]
            model.ttt.requires_grad_(not frozen)
            fit(model, seed, steps, gate=gate, rate=RATE, batch=domain_batch)
        test_BT = task.test_sequences(count)
        domain_nll_BT, on_BT = read(model, domain_batch(0, 0, count)), read(model, test_BT)
        off_BT = read(with_changes(model, lr=0.0), test_BT)
        return {
            ON: reading(on_BT),
            "TTT off": reading(off_BT),
            GAIN: Reading(reading(off_BT - on_BT).values),
            DOMAIN: Reading(reading(domain_nll_BT).values),
        }

    return measure
