"""The results folder of `eaftdrope context`: each cell is stored as soon as it is measured, so a killed command resumes.

probe.json    settings, machine and versions, notes, cells; a variant is called `arm`
probe.csv     a row per number; written at the end, with the report
report.html, figures/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eaftdrope.files import ResultFolder

from .plan import ContextCell, ContextPlan

NAME = "probe.json"
SCHEMA = 1


class ContextResults(ResultFolder):
    """Results of one plan in `folder`. The constructor only reads; `begin` is the first to write.

    Raises:
        UserError: the folder has other results or other files, or cannot be written to.
    """

    def __init__(self, folder: Path, plan: ContextPlan, *, overwrite: bool = False) -> None:
        super().__init__(folder, NAME, "a context measurement", plan.settings, schema=SCHEMA, overwrite=overwrite)
        self._plan, self._overwrite = plan, overwrite
        self._cells = {
            (cell["model"], cell["arm"], cell["probe"], cell["length"]): cell
            for cell in (self.document or {"cells": []})["cells"]
        }

    def begin(self, about: dict[str, Any]) -> None:
        """Create the folder and its document, unless they exist; `about` has the machine and the versions."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._overwrite:
            drawn = [self.folder / "report.html", *(self.folder / "figures").glob("probe_*")]
            for file in [self.folder / NAME, self.folder / "probe.csv", *drawn]:
                file.unlink(missing_ok=True)
        if self.document is None:
            notes = list(self._plan.notes)
            self.document = {
                "schema": SCHEMA,
                "settings": self._plan.settings,
                "about": about,
                "notes": notes,
                "cells": [],
            }
            self.save()

    def has(self, cell: ContextCell) -> bool:
        """Return True if a cell is measured."""
        return cell.key in self._cells

    def left(self) -> list[ContextCell]:
        """Return the cells that are not measured yet, in the plan's order."""
        return [cell for cell in self._plan.cells if not self.has(cell)]

    def add(self, cell: ContextCell, result: dict[str, Any], seconds: float) -> None:
        """Store a cell's result."""
        assert self.document is not None, "begin() creates the document"
        entry = {"model": cell.model, "arm": cell.variant, "probe": cell.probe, "length": cell.length}
        self._cells[cell.key] = {**entry, "seconds": round(seconds, 2), "result": result}
        # in the plan's order, whatever the order of a resumed run
        self.document["cells"] = [self._cells[c.key] for c in self._plan.cells if c.key in self._cells]
        self.save()
