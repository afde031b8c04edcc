"""The folder of a probe: probe.json with every cell as soon as it is measured, so that the same command goes on where a
killed one stopped.

    probe.json    settings, where and with what it was measured, notes, cells; written beside its place and renamed
    probe.csv     a row for every number; written at the end, with the report
    report.html, figures/
"""

from __future__ import annotations

from pathlib import Path

from eaftdrope.files import ResultFolder

from .plan import ContextCell, ContextPlan

NAME = "probe.json"
SCHEMA = 1


class ContextResults(ResultFolder):
    """ContextResults of one plan in `folder`. Making one only looks; `begin` is the first to write.

    Raises:
        UserError: the folder holds other results or strangers' files, or cannot be written to.
    """

    def __init__(self, folder: Path, plan: ContextPlan, *, overwrite: bool = False):
        super().__init__(folder, NAME, "a probe", plan.settings, schema=SCHEMA, overwrite=overwrite)
        self._plan, self._overwrite = plan, overwrite
        self._cells = {
            (cell["model"], cell["arm"], cell["probe"], cell["length"]): cell
            for cell in (self.document or {"cells": []})["cells"]
        }

    def begin(self, about: dict) -> None:
        """Makes the folder and says what is measured here; `about` is where and with what."""
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
        return cell.key in self._cells

    def left(self) -> list[ContextCell]:
        """The cells that are still to be measured, in the plan's order."""
        return [cell for cell in self._plan.cells if not self.has(cell)]

    def add(self, cell: ContextCell, result: dict, seconds: float) -> None:
        """Store a cell's result: from here on it is not measured again."""
        entry = {"model": cell.model, "arm": cell.arm, "probe": cell.probe, "length": cell.length}
        self._cells[cell.key] = {**entry, "seconds": round(seconds, 2), "result": result}
        # in the plan's order, whatever order a resumed run took
        self.document["cells"] = [self._cells[c.key] for c in self._plan.cells if c.key in self._cells]
        self.save()
