"""Accuracy and filler loss as tables for the terminal: means over seeds, one table per theta and optimiser."""

from __future__ import annotations

import statistics

from rich.table import Table

from .arms import ARMS, OPTIMISERS, TITLES
from .evaluate import SCALES
from .verdict import TEXTS, PieceTable, text_name

FAR = SCALES[-1]


def tables(pieces: list[dict]) -> list[Table]:
    found = []
    for optimiser in OPTIMISERS:
        table = PieceTable(pieces, optimiser)
        found += [_grid(table, theta, optimiser) for theta in table.thetas]
    return found


def _grid(table: PieceTable, theta: float, optimiser: str) -> Table:
    title = (
        f"theta {theta:g}, {OPTIMISERS[optimiser]}\naccuracy without / with the fitted temperature (standard deviation of "
        "the latter over seeds); filler: nats per symbol"
    )
    grid = Table(title=title, title_justify="left", title_style="bold")
    grid.add_column("arm", no_wrap=True)
    names = ("1x", *map(text_name, TEXTS), f"{FAR}x, farthest quarter", "filler 1x", f"filler {FAR}x")
    for name in names:
        grid.add_column(name, justify="right")
    for arm in ARMS:
        if table.seeds(theta, arm):
            cells = [f"{table.mean(theta, arm, 1, 'accuracy'):.3f}"]
            cells += [
                _both(table, theta, arm, scale, "accuracy") + _spread(table, theta, arm, scale) for scale in TEXTS
            ]
            cells.append(f"{table.quarters(theta, arm, FAR)[0]:.3f}")
            cells.append(f"{table.mean(theta, arm, 1, 'filler_loss'):.3f}")
            cells.append(_both(table, theta, arm, FAR, "filler_loss"))
            grid.add_row(TITLES[arm], *cells, style="bold" if arm.startswith("drope") else "")
    return grid


def _both(table: PieceTable, theta: float, arm: str, scale: int | str, name: str) -> str:
    return " / ".join(f"{table.mean(theta, arm, scale, name, temperature):.3f}" for temperature in ("plain", "fitted"))


def _spread(table: PieceTable, theta: float, arm: str, scale: int | str) -> str:
    values = table.values(theta, arm, scale, "accuracy").values()
    return f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
