"""What is trained and measured, in order: cells of a model, a kind of contradiction, a share and a seed, with their arms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SMOLLM2 = "SmolLM2-135M"
LLAMAS = {"Llama 0.3M": (96, 2), "Llama 2M": (192, 4), "Llama 8M": (320, 6)}
"""Name -> hidden size and number of blocks."""
SEEDS = (1, 2, 3)
MAIN_SHARES, BETWEEN_SHARES = (0, 10, 40), (5, 20)


@dataclass(frozen=True)
class TrainedArm:
    """What an arm changes; the learning rate is that of the model times `rate`."""

    gate: str = "none"
    rate: float = 1.0
    anchor: dict[str, Any] | None = None


ARMS = {
    "none": TrainedArm(),
    "eaft": TrainedArm("eaft"),
    "conflict-mask": TrainedArm("conflict-mask"),
    # its weight is the mean gate of the eaft arm
    "constant": TrainedArm("constant"),
    "lr/2": TrainedArm(rate=0.5),
    # the preset sft-kl
    "KL anchor": TrainedArm(anchor={"kl": 0.5, "direction": "reverse"}),
}
GATES = ("none", "eaft", "conflict-mask", "constant")


@dataclass(frozen=True)
class Training:
    """Sizes and rates of the trainings of a model; the same for every arm, share and seed.

    Attributes:
        planted: facts among the training rows, 40 % of them.
        skill: rows that teach the new skill.
    """

    rate: float
    planted: int
    skill: int
    batch: int
    held_out: int
    epochs: int = 1
    warmup: float = 0.1
    clip: float = 1.0


TRAININGS = {
    SMOLLM2: Training(rate=1e-4, planted=96, skill=144, batch=8, held_out=48),
    **{
        # as in their pretraining, wider models get a lower rate
        name: Training(rate=5e-4 * (96 / hidden) ** 0.5, planted=128, skill=192, batch=32, held_out=128, epochs=3)
        for name, (hidden, _) in LLAMAS.items()
    },
}


@dataclass(frozen=True)
class DoseCell:
    """Training data of a model: `share` is the percentage of rows that contradict it."""

    model: str
    kind: str
    share: int
    seed: int
    arms: tuple[str, ...] = field(default=GATES, compare=False)

    @property
    def key(self) -> str:
        return f"{self.model}, {self.kind} {self.share} %, seed {self.seed}"

    @property
    def folder(self) -> str:
        return self.key.replace(", ", "-").replace(" %", "").replace(" ", "-")

    @property
    def contradicted(self) -> int:
        """Number of contradicted rows."""
        training = TRAININGS[self.model]
        return round(self.share * (training.planted + training.skill) / 100)


def _main() -> Iterator[DoseCell]:
    for seed in SEEDS:
        for share in reversed(MAIN_SHARES):
            yield DoseCell(SMOLLM2, "conflict", share, seed)


def _llamas() -> Iterator[DoseCell]:
    for seed in SEEDS:
        for model in LLAMAS:
            for share in reversed(MAIN_SHARES):
                yield DoseCell(model, "conflict", share, seed, tuple(ARMS))


def _between() -> Iterator[DoseCell]:
    for seed in SEEDS:
        for share in reversed(BETWEEN_SHARES):
            yield DoseCell(SMOLLM2, "conflict", share, seed)


def _kinds() -> Iterator[DoseCell]:
    for seed in SEEDS:
        for kind in ("schema", "spelling"):
            yield DoseCell(SMOLLM2, kind, 40, seed, ("none", "eaft"))


PARTS = {"main": _main, "llamas": _llamas, "between": _between, "kinds": _kinds}


def cells(parts: tuple[str, ...] = tuple(PARTS)) -> Iterator[DoseCell]:
    """The cells of some parts in order; what is finished compares all arms."""
    for part in parts:
        yield from PARTS[part]()
