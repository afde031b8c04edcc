"""What is compared, and the pieces that a run is made of: one file for each (group, arm).

A group is what shares a trunk: a theta, a seed and an optimiser. NoPE from scratch knows no theta, so that it is a group
of its own, one a seed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from eaftdrope.files import write_atomically

# arm -> share of the steps that it trains without the rotation
RECALIBRATED = {"drope-3": 0.03, "drope-10": 0.10, "drope-25": 0.25, "drope-50": 0.50}
# arms that are the trunk's last weights, seen through another rotary embedding
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
# tried at the largest theta only: they are for when to drop
WHEN_ARMS = ("drope-3", "drope-50")


@dataclass(frozen=True)
class Settings:
    """Of a whole run. `sequences` are evaluated at every length (four times as many at 1x, which is cheap), `fit` of
    them, others, for the temperature."""

    thetas: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    sequences: int
    fit: int
    adamw_seeds: int
    compiled: bool


# 30 steps are over before they would be compiled
QUICK = Settings((40.0,), seeds=1, steps=30, batch=8, sequences=2, fit=2, adamw_seeds=0, compiled=False)


@dataclass(frozen=True)
class Group:
    """`theta` is None for NoPE from scratch."""

    theta: float | None
    seed: int
    optimiser: str
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{NOPE if self.theta is None else f'theta{self.theta:g}'}-{self.optimiser}-seed{self.seed}"

    def piece(self, folder: Path, arm: str) -> Path:
        return folder / "pieces" / f"{self.name}-{arm}.json"


def groups(settings: Settings) -> list[Group]:
    """Seed by seed, so that a run that is stopped has whole seeds; what the verdict needs least comes last."""
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
    """(pieces that are there, names of those that are not)."""
    there, missing = [], []
    for group in wanted:
        for arm in group.arms:
            path = group.piece(folder, arm)
            if path.is_file():
                there.append(json.loads(path.read_text(encoding="utf-8")))
            else:
                missing.append(path.stem)
    return there, missing


def as_job(group: Group, settings: Settings) -> dict:
    return {"group": asdict(group), "settings": asdict(settings)}


def from_job(job: dict) -> tuple[Group, Settings]:
    group, settings = job["group"], job["settings"]
    return (
        Group(**{**group, "arms": tuple(group["arms"])}),
        Settings(**{**settings, "thetas": tuple(settings["thetas"])}),
    )
