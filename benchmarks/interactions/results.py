"""The results of a lab: paired differences with their intervals, and the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.loss.results import environment
from eaftdrope.files import write_atomically

from .lab import RULE, Comparison, Lab
from .run import read_piece

# Student's t, two-sided 95 %, by degrees of freedom
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def document(lab: Lab, folder: Path, command: str) -> dict:
    """Return what results/NAME.json contains."""
    pieces = [content for piece in lab.pieces if (content := read_piece(lab, piece, folder)) is not None]
    return {
        "lab": lab.name,
        "question": lab.question,
        "size": lab.size,
        "unit": lab.unit,
        "axis": lab.axis,
        "bounds": dict(lab.bounds),
        "rule": RULE,
        "command": command,
        "environment": environment(None),
        "cpu_seconds": round(sum(piece["cpu_seconds"] for piece in pieces), 1),
        "missing": [piece.key for piece in lab.pieces if read_piece(lab, piece, folder) is None],
        "means": means(pieces),
        "differences": [found for one in lab.compared if (found := difference(pieces, one)) is not None],
        "pieces": pieces,
    }


def means(pieces: Sequence[dict]) -> list[dict]:
    """Return the mean over seeds and sequences of every reading, with the mean of each seed and the mean curve."""
    found = []
    for arm, reading in dict.fromkeys((piece["arm"], name) for piece in pieces for name in piece["readings"]):
        same = [piece["readings"][reading] for piece in pieces if piece["arm"] == arm and reading in piece["readings"]]
        by_seed = [float(np.mean(one["values"])) for one in same]
        curve = np.mean([one["curve"] for one in same], axis=0)
        found.append(
            {
                "arm": arm,
                "reading": reading,
                "mean": round(float(np.mean(by_seed)), 4),
                "by_seed": [round(value, 4) for value in by_seed],
                "curve": [round(float(value), 4) for value in np.atleast_1d(curve)],
            }
        )
    return found


def difference(pieces: Sequence[dict], comparison: Comparison) -> dict | None:
    """Return a paired difference over the seeds that both readings have; None without two such seeds.

    `interval` is over seeds, `standard_error` over the sequences of the mean over seeds.
    """
    there = {
        (piece["arm"], name, piece["seed"]): np.array(one["values"])
        for piece in pieces
        for name, one in piece["readings"].items()
    }
    sides = (comparison.first, comparison.second)
    seeds = sorted({seed for *_, seed in there if all((*side, seed) in there for side in sides)})
    if len(seeds) < 2:
        return None
    apart_SB = np.array([there[*comparison.first, seed] - there[*comparison.second, seed] for seed in seeds])
    by_seed = apart_SB.mean(1)
    mean, half = by_seed.mean(), _T[len(seeds) - 1] * by_seed.std(ddof=1) / len(seeds) ** 0.5
    counts = abs(mean) > half and abs(mean) >= comparison.smallest and (by_seed * mean > 0).all()
    return {
        "title": comparison.title,
        "first": list(comparison.first),
        "second": list(comparison.second),
        "difference": round(float(mean), 4),
        "interval": [round(float(mean - half), 4), round(float(mean + half), 4)],
        "standard_error": round(float(apart_SB.mean(0).std(ddof=1) / apart_SB.shape[1] ** 0.5), 4),
        "by_seed": [round(float(value), 4) for value in by_seed],
        "smallest": comparison.smallest,
        "verdict": ("higher" if mean > 0 else "lower") if counts else "no difference shown",
    }


def write(content: dict, path: Path) -> Path:
    """Write the results, one piece per line."""
    head = json.dumps({name: value for name, value in content.items() if name != "pieces"}, indent=1)
    pieces = ",\n".join("  " + json.dumps(piece, separators=(",", ":")) for piece in content["pieces"])
    return write_atomically(path, f'{head.removesuffix("}").rstrip()},\n "pieces": [\n{pieces}\n ]\n}}\n')
