"""The arms that are compared, and the pieces of a run: one file for each (group, arm).

A group shares a trunk: a theta, a seed and an optimiser. NoPE from scratch has no theta, so it is a separate group, one per
seed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from eaftdrope.files import write_atomically

# arm -> share of its steps without the rotation
RECALIBRATED = {"drope-3": 0.03, "drope-10": 0.10, "drope-25": 0.25, "drope-50": 0.50}
# arms with the final weights of the trunk and another rotary embedding
SEEN_AS = {"rope": "rope", "pi": "pi", "ntk": "ntk", "yarn": "yarn", "crop": "rope", "dropped": "nope"}
NOPE = "nope"
ARMS = (*SEEN_AS, *RECALIBRATED, NOPE)
TITLES = {
    "rope": "RoPE",
    "pi": "PI",
    "ntk": "NTK",
    "yarn": "YaRN",
    "crop": "crop (RoPE, last 64 tokens)",
    "dropped": "dropped, not recalibrated",
    **{arm: f"DroPE, {share:.0%} recalibration" for arm, share in RECALIBRATED.items()},
    NOPE: "NoPE from scratch",
}
OPTIMISERS = {"muon": "Muon and AdamW, per-head QK-norm", "adamw": "AdamW, no QK-norm"}
# at the largest theta only: when to drop the rotation
WHEN_ARMS = ("drope-3", "drope-50")


@dataclass(frozen=True)
class MiniatureSettings:
    """Settings of a run. `sequences` are evaluated at each length (four times as many at 1x, which is cheap), and `fit`
    other sequences are used for the temperature."""

    thetas: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    sequences: int
    fit: int
    adamw_seeds: int
    compiled: bool


# compilation would take longer than 30 steps
QUICK = MiniatureSettings((40.0,), seeds=1, steps=30, batch=8, sequences=2, fit=2, adamw_seeds=0, compiled=False)


@dataclass(frozen=True)
class Group:
    """The arms that share a trunk. `theta` is None for NoPE from scratch."""

    theta: float | None
    seed: int
    optimiser: str
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{NOPE if self.theta is None else f'theta{self.theta:g}'}-{self.optimiser}-seed{self.seed}"

    def piece(self, folder: Path, arm: str) -> Path:
        return folder / "pieces" / f"{self.name}-{arm}.json"


def groups(settings: MiniatureSettings) -> list[Group]:
    """Return the groups seed by seed, so that an interrupted run has complete seeds; the least important groups are last."""
    found = []
    compared = tuple(arm for arm in ARMS if arm not in (*WHEN_ARMS, NOPE))
    for seed in range(settings.seeds):
        for theta in settings.thetas:
            arms = compared + (WHEN_ARMS if theta == max(settings.thetas) else ())
            found.append(Group(theta, seed, "muon", arms))
        found.append(Group(None, seed, "muon", (NOPE,)))
    ends = dict.fromkeys((min(settings.thetas), max(settings.thetas)))
    found += [Group(theta, seed, "adamw", compared) for seed in range(settings.adamw_seeds) for theta in ends]
    return found


def write_json(path: Path, value: dict) -> None:
    write_atomically(path, json.dumps(value) + "\n")


def read_pieces(folder: Path, wanted: list[Group]) -> tuple[list[dict], list[str]]:
    """Return (existing pieces, names of the missing ones)."""
    there, missing = [], []
    for group in wanted:
        for arm in group.arms:
            path = group.piece(folder, arm)
            if path.is_file():
                there.append(json.loads(path.read_text(encoding="utf-8")))
            else:
                missing.append(path.stem)
    return there, missing


def as_job(group: Group, settings: MiniatureSettings) -> dict:
    return {"group": asdict(group), "settings": asdict(settings)}


def from_job(job: dict) -> tuple[Group, MiniatureSettings]:
    group, settings = job["group"], job["settings"]
    return (
        Group(**{**group, "arms": tuple(group["arms"])}),
        MiniatureSettings(**{**settings, "thetas": tuple(settings["thetas"])}),
    )
