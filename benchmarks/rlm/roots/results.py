"""The results file `roots.json`: losses of the trainings, and every trial, so that pairs can be computed again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.loss.results import environment
from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.trials import TaskTrial
from eaftdrope.files import write_atomically

from . import plan
from .plan import RootCell, TrainedRoot


class RootResults:
    """What is measured so far; `settings` (None: only to read) identify data, sizes and losses."""

    def __init__(self, file: Path, settings: dict[str, Any] | None = None) -> None:
        self.file = file
        self.content: dict[str, Any] = {"settings": settings, "trainings": {}, "cells": {}}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))
            if settings is not None and self.content["settings"] != settings:
                raise UserError(f"{file} has results of other settings. Choose another --output.")
        elif settings is None:
            raise UserError(f"{file}: no such file. `run` writes it.")

    def add_training(self, training: TrainedRoot, losses: list[float], cpu_seconds: float) -> None:
        values = {"arm": training.arm, "seed": training.seed, "cpu_seconds": round(cpu_seconds, 1), "losses": losses}
        self.content["trainings"][training.key] = values
        self._write()

    def trials(self, cell: RootCell) -> list[TaskTrial]:
        """The trials of a cell, by seed of the task."""
        entry = self.content["cells"].get(cell.key, {"trials": []})
        return [TaskTrial(**trial) for trial in entry["trials"]]

    def add_trials(self, cell: RootCell, trials: list[TaskTrial], cpu_seconds: float) -> None:
        entry = self.content["cells"].setdefault(cell.key, {"cpu_seconds": 0.0, "trials": []})
        entry["cpu_seconds"] = round(entry["cpu_seconds"] + cpu_seconds, 1)
        entry["trials"] += [asdict(trial) for trial in trials]
        self._write()

    def done(self, cell: RootCell) -> bool:
        return len(self.trials(cell)) >= plan.TRIALS

    def _write(self) -> None:
        """Write the file, one training or cell per line."""
        self.content["environment"] = environment(os.environ.get("ONEDNN_MAX_CPU_ISA"))
        parts = []
        for name, value in self.content.items():
            if name in ("trainings", "cells"):
                lines = [f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
                parts.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
            else:
                parts.append(f' "{name}": {json.dumps(value)}')
        write_atomically(self.file, "{\n" + ",\n".join(parts) + "\n}\n")
