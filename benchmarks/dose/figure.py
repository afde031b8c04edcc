"""The figure: facts kept beyond plain fine-tuning, against the share of confident conflicts that `inspect` reports."""

from __future__ import annotations

from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import plan
from .measures import FACTS
from .plan import DoseCell
from .results import DoseResults

_TEXT = 8
# Okabe and Ito's colours
COLOURS = {
    "eaft": "#D55E00",
    "conflict-mask": "#009E73",
    "constant": "#999999",
    "lr/2": "#56B4E9",
    "KL anchor": "#CC79A7",
}


def draw(results: DoseResults, path: Path) -> Path:
    """Write the figure: a panel per model, points are seeds, lines their means."""
    models = [model for model in (plan.SMOLLM2, *plan.LLAMAS) if any(_points(results, model, arm) for arm in COLOURS)]
    figure, panels = plt.subplots(
        1, max(1, len(models)), figsize=(4.2 * max(1, len(models)), 3.6), layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models):
        _panel(axes, results, model)
    figure.supxlabel("confident conflicts that inspect reports, % of the trained tokens", fontsize=_TEXT)
    figure.supylabel("facts kept beyond plain fine-tuning, points", fontsize=_TEXT)
    figure.suptitle("At equal target loss", fontsize=_TEXT + 4, fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _panel(axes: Axes, results: DoseResults, model: str) -> None:
    axes.axhline(0, color="#333333", linewidth=0.8)
    for arm, colour in COLOURS.items():
        points = _points(results, model, arm)
        if not points:
            continue
        axes.plot(*zip(*(point for found in points.values() for point in found)), ".", color=colour, markersize=4)
        means = [tuple(sum(column) / len(found) for column in zip(*found)) for found in points.values()]
        axes.plot(*zip(*sorted(means)), color=colour, linewidth=1.5, label=arm)
    axes.legend(fontsize=_TEXT, frameon=False)
    axes.tick_params(labelsize=_TEXT)
    axes.set_title(model, fontsize=_TEXT + 1)


def _points(results: DoseResults, model: str, arm: str) -> dict[int, list[tuple[float, float]]]:
    """share -> (confident conflicts in %, difference in points) of each seed."""
    found: dict[int, list[tuple[float, float]]] = {}
    for share in sorted((*plan.MAIN_SHARES, *plan.BETWEEN_SHARES)):
        for seed in plan.SEEDS:
            cell = DoseCell(model, "conflict", share, seed)
            plain, ours = (results.scores(cell, name, equal=True) for name in ("none", arm))
            if plain and ours:
                conflicts = results.cell(cell)["inspected"]["conflict_share"]
                point = (100 * conflicts, 100 * (ours[FACTS].value - plain[FACTS].value))
                found.setdefault(share, []).append(point)
    return found
