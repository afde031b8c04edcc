"""What a lab is.

A piece is one arm with one seed: it trains what it needs and gives readings, each with one value per sequence (or trial).
All arms of a seed see the same sequences, so any two readings of a seed are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (42, 43, 44)

RULE = (
    "A difference counts if its 95 % interval over seeds (Student's t, paired) excludes 0, all seeds have its sign, and it "
    "is at least the smallest effect of the comparison. Anything else is 'no difference shown'."
)


@dataclass(frozen=True)
class Reading:
    """What an arm gave with a seed.

    Attributes:
        values (`Sequence[float]`): one per sequence or trial.
        curve (`Sequence[float]`): means along an axis that the lab states; empty if there is no such axis.
    """

    values: Sequence[float]
    curve: Sequence[float] = ()


@dataclass(frozen=True)
class Piece:
    """One arm with one seed.

    Attributes:
        settings (`Mapping`): what determines the readings, as in JSON.
        measure (`Callable`): from the folder of trained weights to the readings by name.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    measure: Callable[[Path], dict[str, Reading]]

    @property
    def key(self) -> str:
        return f"{self.arm.replace(' ', '-').replace(',', '')}-{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """The difference `first` minus `second`; each is (arm, reading)."""

    title: str
    first: tuple[str, str]
    second: tuple[str, str]
    smallest: float


@dataclass(frozen=True)
class Lab:
    """A question with its pieces.

    Attributes:
        size (`str`): on what it is measured; it stands beside every result.
        unit (`str`): of the readings.
        axis (`str`): of the curves.
        bounds (`Mapping[str, float]`): known values of the unit, such as ceilings.
    """

    name: str
    question: str
    size: str
    unit: str
    axis: str
    pieces: Sequence[Piece]
    compared: Sequence[Comparison]
    bounds: Mapping[str, float]
