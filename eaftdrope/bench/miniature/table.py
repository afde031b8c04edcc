"""Accuracy and filler loss as tables for the terminal: a table a theta and optimiser, means over seeds with their spread."""

from __future__ import annotations

import statistics

from rich.table import Table as Grid

from .arms import ARMS, OPTIMISERS, TITLES
from .evaluate import SCALES
from .verdict import TEXTS, Table, text_name

FAR = SCALES[-1]


def tables(pieces: list[dict]) -> list[Grid]:
    found = []
    for optimiser in OPTIMISERS:
        table = Table(pieces, optimiser)
        found += [_grid(table, theta, optimiser) for theta in table.thetas]
    return found


def _grid(table: Table, theta: float, optimiser: str) -> Grid:
    title = f"theta {theta:g}, {OPTIMISERS[optimiser]}: accuracy, without and with its fitted temperature"
    grid = Grid(title=title, title_justify="left", title_style="bold")
    grid.add_column("arm", no_wrap=True)
    grid.add_column("1x", justify="right", no_wrap=True)
    for scale in TEXTS:
        grid.add_column(text_name(scale), justify="right", no_wrap=True)
        grid.add_column("+beta", justify="right", no_wrap=True)
    grid.add_column(f"{FAR}x +beta, farthest quarter", justify="right")
    for name in ("filler 1x", f"filler {FAR}x", f"filler {FAR}x +beta"):
        grid.add_column(name, justify="right")
    for arm in ARMS:
        if table.seeds(theta, arm):
            cells = [_spread(table.values(theta, arm, 1, "accuracy"), 3)]
            for scale in TEXTS:
                for temperature in ("plain", "fitted"):
                    cells.append(_spread(table.values(theta, arm, scale, "accuracy", temperature), 3))
            cells.append(f"{table.quarters(theta, arm, FAR)[0]:.3f}")
            for scale, temperature in ((1, "plain"), (FAR, "plain"), (FAR, "fitted")):
                cells.append(f"{table.mean(theta, arm, scale, 'filler_loss', temperature):.3f}")
            grid.add_row(TITLES[arm], *cells, style="bold" if arm.startswith("drope") else "")
    return grid


def _spread(by_seed: dict[int, float], digits: int) -> str:
    """Mean, and the sample standard deviation over seeds where there are some."""
    values = list(by_seed.values())
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({statistics.stdev(values):.{digits}f})"
