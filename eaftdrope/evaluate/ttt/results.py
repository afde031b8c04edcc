"""The results folder of `eaftdrope ttt eval`: each cell is stored as soon as it is measured, so a killed command resumes.

ttt.json      settings, machine and versions, notes, arms that are absent with the reason, cells
report.html, figures/

`of_document` gives the numbers of a document, finished or not, in the terms of the files that measured them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from eaftdrope.files import ResultFolder

from ..scores import Score, scores_from_dicts
from .latency import PositionCost
from .needle import PassKeyAnswer
from .plan import TTTEvalCell, TTTEvalPlan
from .positions import PositionLosses
from .rate import RateFit

NAME = "ttt.json"
SCHEMA = 1


class TTTEvalResults(ResultFolder):
    """Results of one plan in `folder`. The constructor only reads; `begin` is the first to write.

    Raises:
        UserError: the folder has other results or other files, or cannot be written to.
    """

    def __init__(self, folder: Path, plan: TTTEvalPlan, *, overwrite: bool = False) -> None:
        super().__init__(folder, NAME, "an evaluation of TTT", plan.settings, schema=SCHEMA, overwrite=overwrite)
        self._plan, self._overwrite = plan, overwrite
        self._cells = {_key(cell): cell for cell in (self.document or {"cells": []})["cells"]}

    def begin(self, about: dict[str, Any], command: str) -> None:
        """Create the folder and its document, unless they exist; `about` has the machine and the versions."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._overwrite:
            for file in [self.folder / NAME, self.folder / "report.html", *(self.folder / "figures").glob("ttt_*")]:
                file.unlink(missing_ok=True)
        if self.document is None:
            self.document = {
                "schema": SCHEMA,
                "settings": self._plan.settings,
                "about": about,
                "command": command,
                "notes": list(self._plan.notes),
                "absent": dict(self._plan.absent),
                "planned": len(self._plan.cells),
                "cells": [],
            }
            self.save()

    def left(self) -> list[TTTEvalCell]:
        """Return the cells that are not measured yet, in the plan's order."""
        return [cell for cell in self._plan.cells if cell not in self._cells]

    def add(self, cell: TTTEvalCell, result: Any, seconds: float) -> None:
        """Store a cell's result."""
        assert self.document is not None, "begin() creates the document"
        self._cells[cell] = {**cell._asdict(), "seconds": round(seconds, 2), "result": result}
        # in the plan's order, whatever the order of a resumed run
        self.document["cells"] = [self._cells[c] for c in self._plan.cells if c in self._cells]
        self.save()

    def fit(self, arm: str) -> RateFit | None:
        """Return the fit of an arm's inner rate; None if its rate was set or is not fitted yet."""
        return of_document(self.document or {"cells": []}).fits.get(arm)


class Measured(NamedTuple):
    """Everything measured, by arm.

    Attributes:
        losses: of the test passages.
        fits: of the inner rates.
        needles: answers by (arm, place).
        costs: by position, and by reader of `latency.READERS`.
        retention: scores by (arm, state).
    """

    losses: dict[str, PositionLosses]
    fits: dict[str, RateFit]
    needles: dict[tuple[str, str], list[PassKeyAnswer]]
    costs: dict[int, dict[str, PositionCost]]
    retention: dict[tuple[str, str], list[Score]]


def of_document(document: dict[str, Any]) -> Measured:
    """Return the numbers of a document; arms and parts without a cell are missing."""
    sums: dict[str, list] = {}
    rates: dict[str, dict[float, list[float]]] = {}
    found = Measured({}, {}, {}, {}, {})
    for cell in document["cells"]:
        arm, at, result = cell["arm"], cell["at"], cell["result"]
        if cell["probe"] == "loss":
            sums.setdefault(arm, []).append(tuple((nats, count) for nats, count in result))
        elif cell["probe"] == "fit":
            rates.setdefault(arm, {}).setdefault(float(at), []).append(result)
        elif cell["probe"] == "needle":
            found.needles.setdefault((arm, at), []).append(PassKeyAnswer(*result))
        elif cell["probe"] == "latency":
            found.costs[int(at)] = {reader: PositionCost(**cost) for reader, cost in result.items()}
        else:
            found.retention[arm, at] = scores_from_dicts(result)
    edges = tuple(document["settings"]["edges"]) if sums else ()
    found.losses.update({arm: PositionLosses(edges, tuple(parts)) for arm, parts in sums.items()})
    for arm, losses in rates.items():
        # an interrupted fit has fewer passages at some rates
        count = min(map(len, losses.values()))
        means = {rate: sum(values[:count]) / count for rate, values in losses.items()}
        found.fits[arm] = RateFit(means, count)
    return found


def _key(cell: dict[str, Any]) -> TTTEvalCell:
    return TTTEvalCell(cell["probe"], cell["arm"], cell["at"], cell["index"])
