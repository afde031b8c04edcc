"""The toy's figure: loss by position beside the ceilings, along the training's CPU seconds, and naive TTT by inner rate."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from . import task

# Okabe and Ito's palette; every arm has its own marker
_STYLES = {
    ("window", "as trained"): ("#888888", "s"),
    ("naive", "as trained"): ("#CC79A7", "D"),
    ("first", "as trained"): ("#D55E00", "o"),
    ("second", "as trained"): ("#E69F00", "^"),
    ("first", "TTT off"): ("#D55E00", "x"),
    ("full", "as trained"): ("#000000", "v"),
    ("mamba2", "as trained"): ("#0072B2", "P"),
}
_SWEPT = {"naive": ("#CC79A7", "D"), "naive_random": ("#56B4E9", "s"), "naive_in_place": ("#009E73", "^")}
_CEILINGS = (":", "--", "-.")
_TEXT = 8


def draw(result: dict, path: Path) -> Path:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.4), width_ratios=(5, 4, 4), layout="constrained")
    _positions(left, result)
    _training(middle, result)
    _rates(right, result)
    settings, where = result["settings"], result["environment"]
    about = (
        f"{settings['symbols']} symbols, {settings['length']} tokens, window and chunk {settings['ttt']['window']}, "
        f"{settings['test_sequences']} test sequences, seeds {', '.join(map(str, settings['seeds']))}; bands: lowest to "
        f"highest seed. {where['processor']}, one thread, {where['date'][:10]}."
    )
    figure.suptitle(
        "Test-time training where memory beyond the window is needed", fontsize=_TEXT + 4, fontweight="bold"
    )
    figure.supxlabel(textwrap.fill(about, 190), fontsize=_TEXT)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _positions(axes: Axes, result: dict) -> None:
    places = np.arange(len(next(iter(result["ceilings"].values()))["by_bin"])) * task.BIN + task.BIN / 2
    for dashes, (name, ceiling) in zip(_CEILINGS, result["ceilings"].items()):
        axes.plot(places, ceiling["by_bin"], color="#444444", linestyle=dashes, linewidth=1.2, label=f"Bayes, {name}")
    for row in result["means"]:
        if (row["arm"], row["reading"]) in _STYLES:
            colour, marker = _STYLES[row["arm"], row["reading"]]
            title = row["title"] + (", TTT off" if row["reading"] == "TTT off" else "")
            by_seed = np.array(row["by_bin_by_seed"])
            axes.fill_between(places, by_seed.min(0), by_seed.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(places, row["by_bin"], color=colour, marker=marker, markersize=5, linewidth=1.2, label=title)
    axes.set_xticks(range(0, task.LENGTH + 1, 2 * task.BIN))
    axes.legend(fontsize=_TEXT - 1, frameon=False, ncols=2, loc="center right", bbox_to_anchor=(1, 0.66))
    _label(axes, "loss by position (test)", "position", "nats per token")


def _training(axes: Axes, result: dict) -> None:
    for arm, (colour, marker) in {
        arm: style for (arm, reading), style in _STYLES.items() if reading == "as trained"
    }.items():
        curves = [piece["training"]["curve"] for piece in result["pieces"] if piece["arm"] == arm]
        for n, curve in enumerate(curve for curve in curves if curve):
            title = next(row["title"] for row in result["means"] if row["arm"] == arm)
            axes.plot(
                [point["cpu_seconds"] for point in curve], [point["nll"] for point in curve],
                color=colour, marker=marker, markersize=4, linewidth=1, alpha=0.8, label=None if n else title,
            )  # fmt: skip
    axes.legend(fontsize=_TEXT - 1, frameon=False)
    _label(axes, "validation loss along training (one line per seed)", "CPU seconds", "nats per token")


def _rates(axes: Axes, result: dict) -> None:
    for arm, (colour, marker) in _SWEPT.items():
        sweeps = [piece["validation_by_rate"] for piece in result["pieces"] if piece["arm"] == arm]
        for n, sweep in enumerate(sweeps):
            title = next(row["title"] for row in result["means"] if row["arm"] == arm)
            rates = [float(rate) for rate in sweep]
            axes.plot(
                rates, list(sweep.values()),
                color=colour, marker=marker, markersize=4, linewidth=1, label=None if n else title,
            )  # fmt: skip
    axes.set_xscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=_TEXT - 1, frameon=False)
    _label(axes, "naive TTT by inner learning rate (validation)", "inner learning rate", "nats per token")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=_TEXT + 1)
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT - 1)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
