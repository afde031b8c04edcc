"""What is trained and measured, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "rlm" / "smollm2_root.yaml"
MODEL = "package:smollm2-135m-instruct"
DTYPE = "bfloat16"
ROWS = 48
SAVE_EVERY = 12
SEEDS = (1, 2, 3)
# the names that the protocol brings, and the token that ends a turn
EXEMPT = ["repl", "context", "answer", "content", "ready", "<|im_end|>"]
LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy": {"gate": "none"},
    "EAFT": {"gate": "eaft"},
    "EAFT, exempt": {"gate": "eaft", "exempt": EXEMPT},
}
UNTRAINED = "untrained"
TASKS = ("needle", "count")
PHRASINGS = ("train", "test")
CHARS = 192_000
TRIALS, GROUP = 50, 50
# a reply of the expert has at most 60 tokens
ITERATIONS, NEW_TOKENS = 3, 64


@dataclass(frozen=True)
class TrainedRoot:
    """An arm with a seed: of the order of the rows and of the adapter."""

    arm: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def folder(self) -> str:
        return self.key.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class RootCell:
    """The trials of a trained model, or of the untrained one (None), of a task with one set of phrasings."""

    training: TrainedRoot | None
    task: str
    phrasings: str

    @property
    def arm(self) -> str:
        return UNTRAINED if self.training is None else self.training.arm

    @property
    def key(self) -> str:
        model = UNTRAINED if self.training is None else self.training.key
        return f"{model}, {self.task}, {self.phrasings} phrasings"


def steps() -> Iterator[tuple[TrainedRoot | None, list[RootCell]]]:
    """The models and what to measure with each, by seed: what is finished compares all arms.

    What the outcome is of comes first; unseen phrasings and the untrained model follow.
    """
    trainings = [TrainedRoot(arm, seed) for seed in SEEDS for arm in LOSSES]
    for phrasings in PHRASINGS:
        for training in (*trainings, None):
            yield training, [RootCell(training, task, phrasings) for task in TASKS]
