"""The verdict on the claims, by rules that were fixed before the run.

Notable:
- `drope-10` represents DroPE: 10 % of the steps is the upper end of the cheap recalibration that the paper claims.
- Arms are compared with their fitted temperatures, seed by seed on the same text.
- Dense text (24 needles at 8x) was added after seed 0 of the first committed run had shown arms at their ceiling with 6
  needles; it is judged by the same rules, which were not changed.
- A comparison is valid only if RoPE is saturated at 1x; otherwise the sentence reports it as confounded.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .evaluate import DENSE, QUARTERS, SCALES

SATURATED = 0.99
MARGIN = 0.02
RECOVERED = 0.01
HEADLINE = "drope-10"
STRETCHES = ("pi", "ntk", "yarn")
LENGTHS = tuple(scale for scale in SCALES if scale > 1)
# the texts on which arms are compared: lengths, and the greatest length with more needles
TEXTS = (*LENGTHS, DENSE)
SENTENCES = (SCALES[-1], DENSE)
RULES = {
    "saturated": (
        f"an arm is saturated at 1x if in every quarter of the depth its accuracy, the mean over seeds, is at least "
        f"{SATURATED}"
    ),
    "ahead": (
        f"an arm is ahead of another at a length if its accuracy is higher in every seed (at least two) and by at least "
        f"{MARGIN} in the mean; behind is the reverse; anything else is a tie, and one seed is not judged"
    ),
    "best stretch": "of PI, NTK and YaRN the one with the highest mean accuracy at that length",
    "recovered": (
        f"a recalibrated arm has recovered if its mean filler loss at 1x is at most {RECOVERED} nats above RoPE's of "
        "the same theta and it is saturated"
    ),
    "independent of theta": (
        "the outcome against the best stretch at 8x (and on its dense text) is the same at every judged theta"
    ),
}


class PieceTable:
    """The pieces of one optimiser by theta, arm and seed; NoPE from scratch is listed under every theta."""

    def __init__(self, pieces: Sequence[dict], optimiser: str):
        self.thetas = sorted({piece["theta"] for piece in pieces if piece["optimiser"] == optimiser} - {None})
        self._cells: dict[tuple, dict[int, dict]] = {}
        for piece in pieces:
            if piece["optimiser"] == optimiser:
                for theta in self.thetas if piece["theta"] is None else [piece["theta"]]:
                    self._cells.setdefault((theta, piece["arm"]), {})[piece["seed"]] = piece

    def arms(self, theta: float) -> list[str]:
        return [arm for at, arm in self._cells if at == theta]

    def seeds(self, theta: float, arm: str | None) -> dict[int, dict]:
        return self._cells.get((theta, arm), {})

    def values(
        self, theta: float, arm: str, scale: int | str, name: str, temperature: str = "fitted"
    ) -> dict[int, float]:
        """Return the value `name` of a cell by seed."""
        return {seed: piece[temperature][str(scale)][name] for seed, piece in self.seeds(theta, arm).items()}

    def mean(self, theta: float, arm: str, scale: int | str, name: str, temperature: str = "fitted") -> float | None:
        found = self.values(theta, arm, scale, name, temperature)
        return statistics.mean(found.values()) if found else None

    def quarters(self, theta: float, arm: str, scale: int | str) -> list[float]:
        """Return the accuracy by quarter of the depth, averaged over seeds."""
        found = self.values(theta, arm, scale, "by_quarter").values()
        return [statistics.mean(one[number] for one in found) for number in range(QUARTERS)]


def saturated(table: PieceTable, theta: float, arm: str) -> bool:
    return bool(table.seeds(theta, arm)) and min(table.quarters(theta, arm, 1)) >= SATURATED


def compare(ours: dict[int, float], theirs: dict[int, float]) -> tuple[str, float]:
    """Return ahead, behind, tie or not judged, and the mean difference over the common seeds (at least one)."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return "not judged", mean
    if mean >= MARGIN and min(differences) > 0:
        return "ahead", mean
    if mean <= -MARGIN and max(differences) < 0:
        return "behind", mean
    return "tie", mean


def best_stretch(table: PieceTable, theta: float, scale: int | str) -> str | None:
    """Apply the rule; None if nothing was measured."""
    means = {arm: table.mean(theta, arm, scale, "accuracy") for arm in STRETCHES if table.seeds(theta, arm)}
    return max(means, key=means.get) if means else None


def judge(pieces: Sequence[dict], optimiser: str) -> dict:
    """Return the outcomes of the rules for the arms of one optimiser, with the numbers they are based on."""
    table = PieceTable(pieces, optimiser)
    judged = {"saturated_at_1x": {}, "outcomes": [], "recovered": {}}
    for theta in table.thetas:
        judged["saturated_at_1x"][f"{theta:g}"] = {
            arm: saturated(table, theta, arm) for arm in table.arms(theta) if arm not in (*STRETCHES, "crop")
        }
        for ours in ("drope-10", "drope-25"):
            judged["recovered"][f"{theta:g} {ours}"] = _recovered(table, theta, ours)
            for scale in TEXTS:
                stretch = best_stretch(table, theta, scale)
                for theirs, role in ((stretch, "best stretch"), ("nope", ""), ("crop", ""), ("rope", "")):
                    if not table.seeds(theta, theirs).keys() & table.seeds(theta, ours).keys():
                        continue
                    outcome, mean = compare(
                        table.values(theta, ours, scale, "accuracy"),
                        table.values(theta, theirs, scale, "accuracy"),
                    )
                    judged["outcomes"].append(
                        {
                            "theta": theta,
                            "scale": scale,
                            "arm": ours,
                            "against": theirs,
                            "role": role or theirs,
                            "outcome": outcome,
                            "mean_difference": round(mean, 4),
                        }
                    )
    return judged | {"sentences": _sentences(table, judged)}


def _recovered(table: PieceTable, theta: float, arm: str) -> dict:
    ours, rope = (table.mean(theta, name, 1, "filler_loss") for name in (arm, "rope"))
    if ours is None or rope is None:
        return {"recovered": None, "filler_loss_above_rope": None}
    within = ours - rope <= RECOVERED and saturated(table, theta, arm)
    return {"recovered": within, "filler_loss_above_rope": round(ours - rope, 4)}


def _sentences(table: PieceTable, judged: dict) -> list[str]:
    lines = []
    stretched: dict[int | str, dict[float, str]] = {scale: {} for scale in SENTENCES}
    for theta in table.thetas:
        lines.append(_about_saturation(table, theta))
        for found in judged["outcomes"]:
            scale = found["scale"]
            if (found["theta"], found["arm"]) == (theta, HEADLINE) and scale in SENTENCES:
                lines.append(_about(found, scale))
                if found["role"] == "best stretch" and found["outcome"] != "not judged":
                    stretched[scale][theta] = found["outcome"]
        recovery = judged["recovered"][f"{theta:g} {HEADLINE}"]
        if recovery["recovered"] is not None:
            word = "has recovered" if recovery["recovered"] else "has not recovered"
            lines.append(
                f"theta {theta:g}: {HEADLINE} {word} at 1x (filler loss {recovery['filler_loss_above_rope']:+.3f} nats "
                "against RoPE's)."
            )
    for scale, outcomes in stretched.items():
        if len(outcomes) > 1:
            clauses = ", ".join(f"{outcome} at {theta:g}" for theta, outcome in outcomes.items())
            word = "does not depend" if len(set(outcomes.values())) == 1 else "depends"
            lines.append(f"Against the best stretch at {text_name(scale)} the outcome {word} on theta: {clauses}.")
    return lines


def text_name(scale: int | str) -> str:
    """Return the name of a cell for readers."""
    return f"{SCALES[-1]}x, dense" if scale == DENSE else f"{scale}x"


def _about_saturation(table: PieceTable, theta: float) -> str:
    if not table.seeds(theta, "rope"):
        return f"theta {theta:g}: RoPE was not measured."
    low = min(table.quarters(theta, "rope", 1))
    if saturated(table, theta, "rope"):
        return f"theta {theta:g}: RoPE is saturated at 1x (lowest quarter {low:.3f})."
    return (
        f"theta {theta:g}: RoPE is NOT saturated at 1x (lowest quarter {low:.3f} < {SATURATED}), so that every comparison "
        "with it and its stretches is confounded."
    )


def _about(found: dict, scale: int | str) -> str:
    against = f"the best stretch ({found['against']})" if found["role"] == "best stretch" else found["against"]
    words = {"ahead": "is ahead of", "behind": "is behind", "tie": "ties with", "not judged": "is not judged against"}
    difference = f"{found['mean_difference']:+.3f}"
    what = f"theta {found['theta']:g}, {text_name(scale)}: {found['arm']} {words[found['outcome']]} {against}"
    return f"{what} (accuracy {difference})."
