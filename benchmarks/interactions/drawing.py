"""The figure of a lab: its curves, and its paired differences with their intervals."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

_TEXT = 8
# Okabe and Ito's palette
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
_MARKERS = "osD^vPX*"
# of the names of the curves
_COLUMNS = 3


def draw(content: dict, path: Path) -> Path:
    """Write the figure of a document of `results`."""
    names = sum(bool(row["curve"]) for row in content["means"])
    rows = -(-names // _COLUMNS)
    figure, axes = plt.subplot_mosaic(
        [["curves", "differences"], ["names", "names"]],
        height_ratios=[20, max(rows, 0.1)],
        figsize=(13, 5 + 0.2 * rows),
        layout="constrained",
    )
    _curves(axes["curves"], content)
    _differences(axes["differences"], content)
    axes["names"].axis("off")
    if names:
        lines = axes["curves"].get_legend_handles_labels()
        axes["names"].legend(*lines, loc="center", ncols=_COLUMNS, fontsize=_TEXT - 1, frameon=False)
    figure.suptitle(content["question"], fontsize=_TEXT + 4, fontweight="bold")
    where = content["environment"]
    about = f"{content['size']} {where['processor']}, {where['date'][:10]}. {content['rule']}"
    figure.supxlabel(textwrap.fill(about, 180), fontsize=_TEXT)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _curves(axes: Axes, content: dict) -> None:
    rows = [row for row in content["means"] if row["curve"]]
    for number, row in enumerate(rows):
        name = row["arm"] if row["reading"] == "as trained" else f"{row['arm']}: {row['reading']}"
        axes.plot(
            row["curve"],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number // len(_COLOURS) % len(_MARKERS)],
            linestyle=("-", "--", ":")[number // len(_COLOURS) % 3],
            markersize=4,
            linewidth=1,
            label=name,
        )
    for name, value in content["bounds"].items():
        axes.axhline(value, color="#888888", linestyle=":", linewidth=1)
        axes.annotate(name, (0, value), fontsize=_TEXT - 1, color="#555555")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, content["axis"], content["unit"])


def _differences(axes: Axes, content: dict) -> None:
    found = content["differences"][::-1]
    for place, one in enumerate(found):
        low, high = one["interval"]
        colour = "#888888" if one["verdict"].startswith("no") else "#D55E00"
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(one["by_seed"], [place] * len(one["by_seed"]), "o", color=colour, markersize=4)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(found)), [textwrap.fill(one["title"], 42) for one in found])
    _label(axes, f"paired difference, {content['unit']}: seeds, and 95 % over them", "")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT - 1)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
