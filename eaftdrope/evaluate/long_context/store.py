"""The folder of a probe: probe.json with every cell as soon as it is measured, so that the same command goes on where a
killed one stopped.

    probe.json    settings, where and with what it was measured, notes, cells; written beside its place and renamed
    probe.csv     a row for every number; written at the end, with the report
    report.html, figures/
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from eaftdrope.errors import UserError

from .plan import Cell, Plan

NAME = "probe.json"
SCHEMA = 1
_WAYS_OUT = "Nothing was touched: name another folder with --output, or pass --overwrite to delete it and start anew."


class Results:
    """Results of one plan in `folder`. Making one only looks; `begin` is the first to write.

    Raises:
        UserError: the folder holds other results or strangers' files, or cannot be written to.
    """

    def __init__(self, folder: Path, plan: Plan, *, overwrite: bool = False):
        self.folder, self._plan, self._overwrite = folder, plan, overwrite
        self._check_writable()
        if not (folder / NAME).is_file() and not self._is_free():
            raise UserError(
                f"{folder} is not empty and holds no {NAME} of ours. Nothing was touched: name another folder with --output."
            )
        self.document = None if overwrite else self._read()
        if self.document is not None and self.document["settings"] != plan.settings:
            keys = _differences(self.document["settings"], plan.settings)
            raise UserError(f"{folder} holds a probe with other settings (different: {keys}). {_WAYS_OUT}")
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
            self._write()

    def has(self, cell: Cell) -> bool:
        return cell.key in self._cells

    def left(self) -> list[Cell]:
        """The cells that are still to be measured, in the plan's order."""
        return [cell for cell in self._plan.cells if not self.has(cell)]

    def add(self, cell: Cell, result: dict, seconds: float) -> None:
        """Store a cell's result: from here on it is not measured again."""
        entry = {"model": cell.model, "arm": cell.arm, "probe": cell.probe, "length": cell.length}
        self._cells[cell.key] = {**entry, "seconds": round(seconds, 2), "result": result}
        # in the plan's order, whatever order a resumed run took
        self.document["cells"] = [self._cells[c.key] for c in self._plan.cells if c.key in self._cells]
        self._write()

    def write(self, name: str, text: str) -> Path:
        """A small file, whole or not at all."""
        partial = self.folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / name)
        return self.folder / name

    def _write(self) -> None:
        self.write(NAME, json.dumps(self.document) + "\n")

    def _read(self) -> dict | None:
        file = self.folder / NAME
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise UserError(f"{file} cannot be read as results of this version. {_WAYS_OUT}")
        return document

    def _is_free(self) -> bool:
        return not self.folder.exists() or all(entry.name == f".{NAME}.partial" for entry in self.folder.iterdir())

    def _check_writable(self) -> None:
        place = self.folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            why = "no permission to write in" if place.is_dir() else "this is a file:"
            raise UserError(f"--output {self.folder} cannot be made: {why} {place}. Name another folder.")


def _differences(old: dict, new: dict) -> str:
    """Dotted keys whose values differ."""

    def flat(data, prefix=""):
        if isinstance(data, list) and data and isinstance(data[0], dict):
            data = {item["name"]: item for item in data}
        if isinstance(data, dict):
            return {key: value for name in data for key, value in flat(data[name], f"{prefix}{name}.").items()}
        return {prefix[:-1]: data}

    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
