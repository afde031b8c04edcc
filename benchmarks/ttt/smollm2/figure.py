"""The figure: loss by position relative to full attention, fitted rates, and paired differences with their intervals."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import plan
from .document import Document
from .plan import LONG, ORIGINAL, SHORT, Evaluate
from .summary import TITLES, all_arms, differences, passages, untrained_differences

_TEXT = 8
# Okabe and Ito's colours
_STYLES = {
    "window + sink": ("#000000", "o", "-"),
    "naive TTT, prime": ("#D55E00", "s", "-"),
    "naive TTT, in place": ("#E69F00", "D", "--"),
    "naive TTT, prime, Muon steps": ("#CC79A7", "x", "-"),
    "control, equal time": ("#0072B2", "v", "-"),
    "control, equal time, naive TTT": ("#56B4E9", "^", "--"),
    "meta": ("#009E73", "P", "-"),
}
_RATES = {"prime": "#D55E00", "in_place": "#E69F00", "warmup": "#009E73", "muon": "#0072B2", "muon_warmup": "#56B4E9"}


def draw(found: Document, path: Path) -> Path:
    """Write the figure; trained arms are those of the longest finished trainings."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    budget = LONG if differences(found, LONG) else SHORT
    _positions(left, found, budget)
    _rates(middle, found)
    # without the sink, ten times as far away as the others
    rows = [row for row in untrained_differences(found) if not row[0].startswith(TITLES["window"])]
    trained = differences(found, budget)
    _differences(right, rows + trained)
    settings = found.content["settings"]
    figure.suptitle("SmolLM2-135M reading a novel, window 256 + sink 4", fontsize=_TEXT + 4, fontweight="bold")
    about = f"{settings['test_passages']} passages of 2,048 tokens; bars: 95 % over passages"
    if trained:
        about += f"; trainings of {budget // 60} CPU minutes, orange: seeds"
    figure.supxlabel(about, fontsize=_TEXT)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _positions(axes: Axes, found: Document, budget: int) -> None:
    full = passages(found, Evaluate(ORIGINAL, "full", 0.0, "test"))
    arms = all_arms(found)
    for title, (colour, marker, dashes) in _STYLES.items():
        tasks = arms.get(title) or arms.get(f"{title}, {budget // 60} CPU min")
        if full is None or not tasks:
            continue
        runs = [found.entry(task)["values"] for task in tasks]
        apart = [
            statistics.mean(run[row][place] - full[row][place] for run in runs for row in range(len(full)))
            for place in range(len(full[0]))
        ]
        style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4, "linewidth": 1.2}
        axes.plot([plan.CHUNK * (place + 0.5) for place in range(len(apart))], apart, label=title, **style)
    axes.axhline(0, color="#888888", linewidth=0.6)
    axes.axvline(plan.WINDOW, color="#cccccc", linewidth=0.8)
    axes.legend(fontsize=_TEXT - 1, frameon=False)
    _name(axes, "loss minus full attention of the original", "position", "nats per token")


def _rates(axes: Axes, found: Document) -> None:
    for reads, colour in _RATES.items():
        losses = sorted(found.fit(ORIGINAL, reads).items())
        if losses:
            axes.plot(
                *zip(*losses, strict=True), color=colour, marker="o", markersize=4, label=TITLES[reads], linewidth=1.2
            )
    axes.set_xscale("log")
    low = min((min(line.get_ydata()) for line in axes.lines), default=0) - 0.005
    # rates that destroy the model are off the scale
    axes.set_ylim(low, low + 0.05)
    axes.legend(fontsize=_TEXT - 1, frameon=False)
    _name(
        axes,
        "untrained: inner rate, on the fit passages (higher losses cut off)",
        "inner rate",
        "nats per token beyond the window",
    )


def _differences(axes: Axes, rows: list[tuple[str, float, float, list[float]]]) -> None:
    rows = rows[::-1]
    for place, (_, mean, error, by_seed) in enumerate(rows):
        axes.errorbar(mean, place, xerr=1.96 * error, color="#0072B2", marker="o", markersize=5, capsize=3)
        if len(by_seed) > 1:
            axes.plot(by_seed, [place] * len(by_seed), color="#D55E00", marker="|", linestyle="none", markersize=8)
    axes.axvline(0, color="#888888", linewidth=0.6)
    axes.set_yticks(range(len(rows)), [row[0].replace(" - ", "\n- ") for row in rows])
    _name(axes, "paired differences (left of 0: the first is better)", "nats per token beyond the window", "")


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=_TEXT + 1)
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT - 1)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
