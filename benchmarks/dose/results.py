"""The results file `dose.json`: scores of the base models, and of every arm as trained and at equal target loss."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.loss.results import environment
from eaftdrope.errors import UserError
from eaftdrope.evaluate.scores import Score, score_units
from eaftdrope.files import write_atomically

from .measures import Scores
from .plan import DoseCell


class DoseResults:
    """What is measured so far. `settings` (None: only to read) has the settings of each model, of which those of another
    model may differ from the stored ones."""

    def __init__(self, file: Path, settings: dict[str, Any] | None = None) -> None:
        self.file = file
        self.content: dict[str, Any] = {"settings": {}, "bases": {}, "cells": {}}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))
        elif settings is None:
            raise UserError(f"{file}: no such file. `run` writes it.")
        for model, values in (settings or {}).items():
            if self.content["settings"].setdefault(model, values) != values:
                raise UserError(f"{file} has results of {model} with other settings. Choose another --output.")

    def base(self, model: str) -> Scores | None:
        """Scores of a base model."""
        entry = self.content["bases"].get(model)
        return None if entry is None else restored(entry)

    def add_base(self, model: str, scores: Scores) -> None:
        self.content["bases"][model] = stored(scores)
        self._write()

    def cell(self, cell: DoseCell) -> dict[str, Any]:
        """The entry of a cell, an empty one if nothing is measured."""
        return self.content["cells"].get(cell.key, {"inspected": None, "arms": {}})

    def add_inspected(self, cell: DoseCell, summary: dict[str, float]) -> None:
        self._entry(cell)["inspected"] = {key: round(value, 6) for key, value in summary.items()}
        self._write()

    def add_trained(self, cell: DoseCell, arm: str, facts: dict[str, Any], scores: Scores) -> None:
        """Store a finished training: `facts` has what is known of it beside its scores."""
        self._entry(cell)["arms"][arm] = {**facts, "scores": stored(scores)}
        self._write()

    def add_matched(self, cell: DoseCell, arm: str, entry: dict[str, Any], scores: Scores) -> None:
        """Store an arm at equal target loss: `entry` has the share, or why it does not take part."""
        self._entry(cell)["arms"][arm]["matched"] = {**entry, "scores": stored(scores)}
        self._write()

    def scores(self, cell: DoseCell, arm: str, *, equal: bool = False) -> Scores | None:
        """Scores of an arm as trained, or at equal target loss; None if they are not measured."""
        entry = self.cell(cell)["arms"].get(arm)
        if entry is not None and equal:
            entry = entry.get("matched")
        return restored(entry["scores"]) if entry is not None and entry["scores"] else None

    def done(self, cell: DoseCell) -> bool:
        """Whether every arm of a cell is trained and was brought to the equal target loss, or left out."""
        arms = self.cell(cell)["arms"]
        return all(arm in arms and "matched" in arms[arm] for arm in cell.arms)

    def _entry(self, cell: DoseCell) -> dict[str, Any]:
        return self.content["cells"].setdefault(cell.key, self.cell(cell))

    def _write(self) -> None:
        """Write the file, one arm per line."""
        self.content["environment"] = environment(os.environ.get("ONEDNN_MAX_CPU_ISA"))
        head = {name: self.content[name] for name in ("settings", "environment", "bases")}
        cells = []
        for key, cell in self.content["cells"].items():
            arms = ",\n".join(f"   {json.dumps(arm)}: {json.dumps(entry)}" for arm, entry in cell["arms"].items())
            cells.append(
                f'  {json.dumps(key)}: {{"inspected": {json.dumps(cell["inspected"])}, "arms": {{\n{arms}\n  }}}}'
            )
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        lines.append(' "cells": {\n' + ",\n".join(cells) + "\n }")
        write_atomically(self.file, "{\n" + ",\n".join(lines) + "\n}\n")


def stored(scores: Scores) -> dict[str, Any]:
    """Scores as JSON; hits as a string of digits, and nats to five digits."""
    found = {}
    for name, score in scores.items():
        entry = {key: value for key, value in asdict(score).items() if key in ("kind", "better", "group", "least")}
        if score.kind == "share":
            entry["hits"] = "".join(str(int(hit)) for hit, _ in score.units)
        else:
            entry["units"] = [[round(total, 5), weight] for total, weight in score.units]
        found[name] = {"value": round(score.value, 6), **entry}
    return found


def restored(entries: dict[str, Any]) -> Scores:
    """The scores that `stored` wrote."""
    return {name: _score(name, entry) for name, entry in entries.items()}


def _score(name: str, entry: dict[str, Any]) -> Score:
    units = [(float(hit), 1.0) for hit in entry["hits"]] if "hits" in entry else [tuple(u) for u in entry["units"]]
    options = {key: entry[key] for key in ("kind", "better", "least")}
    return score_units(name, entry["group"], name, units, **options)
