"""The results folder of `eaftdrope rlm bench`: trials are stored as soon as they are measured, so a killed command resumes.

rlm_bench.json   settings, machine and versions, cells with their trials
scores.json      the score of each journal, for `eaftdrope rlm rows --scores`
journals/        of the arm rlm: a trial that was killed resumes from its own
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eaftdrope.files import ResultFolder

from .plan import BenchCell, BenchPlan
from .trials import TaskTrial

NAME = "rlm_bench.json"
SCHEMA = 1


class BenchResults(ResultFolder):
    """Results of one plan in `folder`. The constructor only reads; `begin` is the first to write.

    Raises:
        UserError: the folder has other results or other files, or cannot be written to.
    """

    def __init__(self, folder: Path, plan: BenchPlan, *, overwrite: bool = False) -> None:
        # as JSON has it
        settings = json.loads(json.dumps(plan.settings))
        super().__init__(folder, NAME, "an RLM bench", settings, schema=SCHEMA, overwrite=overwrite)
        self._plan, self._settings, self._overwrite = plan, settings, overwrite
        stored = (self.document or {"cells": []})["cells"]
        self._trials = {
            (cell["task"], cell["chars"], cell["arm"]): [TaskTrial(**trial) for trial in cell["trials"]]
            for cell in stored
        }

    @property
    def journals(self) -> Path:
        """The folder of the journals."""
        return self.folder / "journals"

    def begin(self, about: dict[str, Any], command: str) -> None:
        """Create the folder and its document, unless they exist.

        Args:
            about: the machine and the versions.
            command: the command line, as a user would type it.
        """
        self.journals.mkdir(parents=True, exist_ok=True)
        if self._overwrite:
            for file in [self.folder / NAME, self.folder / "scores.json", *self.journals.glob("*.jsonl")]:
                file.unlink(missing_ok=True)
        if self.document is None:
            head = {"schema": SCHEMA, "settings": self._settings, "about": about, "command": command}
            planned = sum(cell.trials for cell in self._plan.cells)
            self.document = {**head, "planned": planned, "cells": []}
            self.save()

    def trials(self, cell: BenchCell) -> list[TaskTrial]:
        """The measured trials of a cell, by seed."""
        return self._trials.get(cell.key, [])

    def add(self, cell: BenchCell, trials: list[TaskTrial]) -> None:
        """Store the next trials of a cell."""
        assert self.document is not None, "begin() creates the document"
        self._trials[cell.key] = [*self.trials(cell), *trials]
        self.document["cells"] = [
            {"task": c.task, "chars": c.chars, "arm": c.arm, "trials": [asdict(trial) for trial in self.trials(c)]}
            for c in self._plan.cells
            if self.trials(c)
        ]
        scores = {
            f"{journal_label(c)}{trial.seed}.jsonl": trial.score
            for c in self._plan.cells
            if c.arm == "rlm"
            for trial in self.trials(c)
        }
        self.write("scores.json", json.dumps(scores, indent=0) + "\n")
        self.save()


def journal_label(cell: BenchCell) -> str:
    """The beginning of the names of a cell's journals."""
    return f"{cell.task}-{cell.chars}-"
