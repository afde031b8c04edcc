"""What a study measured of the gate at a share of confident conflicts, as a sentence beside the share of the user's data.

The results are in gate_benefit.json, which `python -m benchmarks.dose report` writes once the study's main part is complete.
Without that file there is no sentence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("gate_benefit.json")


@dataclass(frozen=True)
class BenefitPoint:
    """The study's result at one share of confident conflicts.

    Attributes:
        conflicts: share of the trained tokens that `inspect` reports.
        facts: difference, gate minus plain fine-tuning, of the share of known facts that are kept at equal target loss.
        half: half the width of its interval over the seeds.
        word: the verdict by the study's rule.
    """

    conflicts: float
    facts: float
    half: float
    word: str

    @property
    def text(self) -> str:
        """The point as text, such as `+3.1 ± 1.2 points at 0.90 % confident conflicts (worth using)`."""
        return (
            f"{100 * self.facts:+.1f} ± {100 * self.half:.1f} points at {100 * self.conflicts:.2f} % confident conflicts "
            f"({self.word})"
        )


def gate_benefit(conflict_share: float, file: Path = FILE) -> str | None:
    """Return a sentence on the measured shares around a share of confident conflicts; None without results of the study."""
    if not file.is_file():
        return None
    study = json.loads(file.read_text(encoding="utf-8"))
    points = sorted((BenefitPoint(**point) for point in study["points"]), key=lambda point: point.conflicts)
    below = [point for point in points if point.conflicts <= conflict_share][-1:]
    above = [point for point in points if point.conflicts > conflict_share][:1]
    return f"{_range(conflict_share, below, above)} {_finding(study, [*below, *above])}"


def _range(share: float, below: list[BenefitPoint], above: list[BenefitPoint]) -> str:
    shown = f"{100 * share:.2f} % of these tokens are confident conflicts"
    if not above:
        return f"{shown}, which is the largest share that the study of the gate measured, or more."
    if not below:
        return f"{shown}, less than the smallest share that the study of the gate measured."
    return f"{shown}, which is between two shares that the study of the gate measured."


def _finding(study: dict[str, Any], points: list[BenefitPoint]) -> str:
    listed = " and ".join(point.text for point in points)
    return (
        f"There ({study['model']}, {study['seeds']} seeds, {study['date']}), the gate {study['arm']} changed the share of "
        f"known facts that are kept at equal target loss by {listed}. Other models and data may differ: "
        f"`eaftdrope compare RECIPE --arms none,eaft,constant --seeds 3 --match target` measures yours."
    )
