"""The figure of a run, one column per theta: accuracy over length without and with the fitted temperature, filler loss
below, and when to drop the rotation.

The dense text of the greatest length stands separately on the right. A line is the mean of an arm over seeds, its band the
range over seeds. Colours are Okabe and Ito's, and every arm has its own marker.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .arms import RECALIBRATED, TITLES
from .evaluate import DENSE, SCALES
from .verdict import PieceTable, saturated

_STYLES = {
    "drope-10": ("#D55E00", "o", "-"),
    "drope-25": ("#E69F00", "s", "-"),
    "nope": ("#009E73", "^", "-"),
    "yarn": ("#0072B2", "v", "--"),
    "ntk": ("#56B4E9", "D", "--"),
    "pi": ("#CC79A7", "P", "--"),
    "rope": ("#000000", "x", ":"),
    "crop": ("#888888", "+", ":"),
}
_TEXT = 8


def draw(result: dict, path: Path) -> Path:
    """Write the figure of the arms of the main optimiser."""
    table = PieceTable(result["pieces"], "muon")
    columns = len(table.thetas)
    figure, grid = plt.subplots(3, columns + 1, figsize=(3.3 * (columns + 1), 8.6), squeeze=False, layout="constrained")
    for column, theta in enumerate(table.thetas):
        word = "" if saturated(table, theta, "rope") else "\nRoPE NOT saturated at 1x"
        for row, temperature, title in ((0, "plain", "no temperature"), (1, "fitted", "fitted temperature")):
            axes = grid[row, column]
            _lines(axes, table, theta, "accuracy", temperature)
            _name(axes, f"theta {theta:g}, {title}{word}", "length / training length", "needle accuracy")
            axes.set_ylim(-0.03, 1.03)
        _lines(grid[2, column], table, theta, "filler_loss", "fitted")
        _name(grid[2, column], f"theta {theta:g}, filler, fitted", "length / training length", "nats per symbol")
        grid[2, column].axhline(result["filler_entropy"]["nats"], color="#000000", linewidth=0.6)
    _share_scale(grid[2, :columns])
    _when(grid[0, columns], table, table.thetas[-1], "filler_loss", "filler: validation loss at 1x")
    _when(grid[1, columns], table, table.thetas[-1], "answer_loss", "answers: validation loss at 1x")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    grid[2, columns].axis("off")
    grid[2, columns].legend(handles, labels, loc="center", fontsize=_TEXT + 1, frameon=False)
    where, settings = result["environment"], result["settings"]
    about = (
        f"{settings['seeds']} seeds (bands and bars: lowest to highest), {settings['steps']} steps of {settings['batch']} x "
        f"{settings['trained_length']} tokens; thin line: entropy of the filler; {where['date'][:10]}"
    )
    figure.suptitle("DroPE in miniature: needles beyond the training length", fontsize=_TEXT + 4, fontweight="bold")
    figure.supxlabel(textwrap.fill(about, 45 * (columns + 1)), fontsize=_TEXT)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _lines(axes: Axes, table: PieceTable, theta: float, name: str, temperature: str) -> None:
    for number, (arm, (colour, marker, dashes)) in enumerate(_STYLES.items()):
        if not table.seeds(theta, arm):
            continue
        by_scale = [list(table.values(theta, arm, scale, name, temperature).values()) for scale in SCALES]
        places = range(len(SCALES))
        axes.fill_between(places, [*map(min, by_scale)], [*map(max, by_scale)], color=colour, alpha=0.15, linewidth=0)
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3}
        axes.plot(places, [*map(_mean, by_scale)], linestyle=dashes, label=TITLES[arm], **style)
        dense = list(table.values(theta, arm, DENSE, name, temperature).values())
        # slightly offset, so that the ranges do not overlap
        at = len(SCALES) + 0.12 * (number - len(_STYLES) / 2)
        axes.vlines(at, min(dense), max(dense), color=colour, linewidth=1.3)
        axes.plot(at, _mean(dense), linestyle="none", **style)
    axes.axvline(len(SCALES) - 0.65, color="#cccccc", linewidth=0.8)
    axes.set_xticks(range(len(SCALES) + 1), [*(f"{scale}x" for scale in SCALES), f"{SCALES[-1]}x\ndense"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _share_scale(row) -> None:
    limits = [axes.get_ylim() for axes in row]
    for axes in row:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _when(axes: Axes, table: PieceTable, theta: float, name: str, title: str) -> None:
    """Draw the loss at the training length by the step at which the rotation was dropped: never (RoPE) is 100 %."""
    arms = {"nope": 0.0, **{arm: 1 - share for arm, share in RECALIBRATED.items()}, "rope": 1.0}
    found = sorted((at, table.values(theta, arm, 1, name)) for arm, at in arms.items() if table.seeds(theta, arm))
    for at, values in found:
        axes.plot([100 * at] * len(values), list(values.values()), color="#888888", marker="_", linestyle="none")
    middle = [_mean(list(values.values())) for _, values in found]
    axes.plot([100 * at for at, _ in found], middle, color="#D55E00", marker="o", markersize=5, linewidth=1.3)
    axes.set_xticks([0, 50, 75, 90, 100], ["0\nNoPE", "50", "75", "90", "100\nRoPE"])
    _name(axes, f"{title}, theta {theta:g}", "rotation dropped after % of the steps", "nats")


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=_TEXT + 1)
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT - 1)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
