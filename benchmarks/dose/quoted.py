"""The results that `eaftdrope inspect` quotes: the curve of SmolLM2, written into the package."""

from __future__ import annotations

import json
from pathlib import Path

from eaftdrope.files import write_atomically
from eaftdrope.inspection.gate_benefit import FILE

from . import plan
from .results import DoseResults
from .rule import verdicts

ARM = "eaft"
MODEL_NAME = "SmolLM2-135M-Instruct"


def write_quoted(results: DoseResults, file: Path = FILE) -> Path | None:
    """Write the points of the curve, or nothing (None) before the main part of the study is complete."""
    if not all(results.done(cell) for cell in plan.cells(("main",))):
        return None
    points = []
    for family in (plan.MAIN_SHARES, plan.BETWEEN_SHARES):
        for one in verdicts(results, plan.SMOLLM2, "conflict", family, ARM):
            if one.seeds == len(plan.SEEDS):
                conflicts = round(one.inspected[0], 5)
                facts, half = round(one.facts.difference, 4), round(one.half, 4)
                points.append({"conflicts": conflicts, "facts": facts, "half": half, "word": one.word})
    if not points:
        return None
    study = {
        "model": MODEL_NAME,
        "arm": ARM,
        "seeds": len(plan.SEEDS),
        "date": results.content["environment"]["date"][:10],
        "points": sorted(points, key=lambda point: point["conflicts"]),
    }
    return write_atomically(file, json.dumps(study, indent=1) + "\n")
