"""Figures of `eaftdrope context`: heat maps of needles found, and curves by length and by position.

Colour and marker encode the rotary embedding, the line style encodes the model, so that colour vision is not needed. A
dotted line marks the trained length.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from eaftdrope.evaluate.long_context.lengths import multiple, slope_text
from eaftdrope.evaluate.long_context.needles import KINDS
from eaftdrope.evaluate.long_context.variants import AS_IS, BASELINES

from ..words import end_of
from .style import styled

# Okabe and Ito's palette
_COLOURS = dict(
    zip((AS_IS, *BASELINES), ("#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00"), strict=True)
)
_MARKERS = dict(zip((AS_IS, *BASELINES), "osD^vX", strict=True))
_STYLES = ("-", "--", ":", "-.")
_TEXT = 8.5
# With more panels per row than this, they would be too small to read.
_COLUMNS = 4


def context_figures(document: dict, rows: Sequence[dict]) -> dict[str, Figure]:
    """Return the figures by name, for those metrics that were measured.

    Args:
        document: probe.json.
        rows: `rows_of(document)`.
    """
    with styled():
        figures = {
            "probe_needles_by_depth": _heat_maps(rows),
            "probe_needles_by_length": _accuracies(rows),
            "probe_perplexity_by_length": _perplexity(rows),
            "probe_perplexity_by_position": _positions(rows),
            "probe_attention_by_length": _attention(rows),
        }
        figures = {name: figure for name, figure in figures.items() if figure is not None}
        for figure in figures.values():
            figure.supxlabel(_caption(document, figure), fontsize=_TEXT - 1, color="#555555", x=0.01, ha="left")
    return figures


def draw_temperature(document: dict, path: Path) -> None:
    """Write the figure of a temperature fit: perplexity over beta for each length, and beta over length with the fit."""
    fits = document["fits"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for fit, colour in zip(fits, list(_COLOURS.values()) * len(fits)):
        betas = [point["beta"] for point in fit["tried"]]
        change = [_percent(point["perplexity"], fit["perplexity_at_1"]) for point in fit["tried"]]
        left.plot(betas, change, "o-", color=colour, markersize=3, linewidth=1, label=f"{fit['length']:,} tokens")
        left.plot([fit["beta"]], [min(change)], "*", color=colour, markersize=10)
    left.axhline(0, color="#999999", linewidth=0.8)
    left.axvline(1, color="#999999", linewidth=0.8)
    # Far from its minimum the loss explodes and would flatten the part of interest.
    deepest = max(0.5, *(-_percent(fit["perplexity"], fit["perplexity_at_1"]) for fit in fits))
    left.set_ylim(-1.2 * deepest, 2.5 * deepest)
    best = [1.0, *(fit["beta"] for fit in fits)]
    left.set_xlim(min(best) - 0.2, max(best) + 0.2)
    left.set_xlabel("temperature beta", fontsize=_TEXT)
    left.set_ylabel("change of perplexity from beta = 1, %", fontsize=_TEXT)
    left.legend(fontsize=_TEXT, frameon=False)
    _betas(right, document)
    for axes in (left, right):
        _tidy(axes)
    where = f"{document['model']}; text: {document['text']}; at most {document['windows']} windows per length"
    figure.supxlabel(where, fontsize=_TEXT - 1, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _percent(value: float, reference: float) -> float:
    return 100 * (value / reference - 1)


def _betas(axes: Axes, document: dict) -> None:
    """Draw the best beta of each length and the fitted line."""
    fits, trained = document["fits"], document["trained_length"]
    for fit in fits:
        style = "full" if fit["distinguishable"] else "none"
        axes.plot(fit["length"], fit["beta"], "o", color="#0072B2", fillstyle=style, markersize=7)
    longest = max(fit["length"] for fit in fits)
    line = [trained * (longest / trained) ** (i / 20) for i in range(21)]
    betas = [1 + document["slope"] * math.log(length / trained) for length in line]
    axes.plot(line, betas, color="#0072B2", linewidth=1.2, label=slope_text(document["slope"], "s"))
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.set_xscale("log", base=2)
    lengths = [trained, *(fit["length"] for fit in fits)]
    axes.set_xticks(lengths, [f"{length:,}\n{multiple(length, trained)}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length in tokens and in multiples of the trained length", fontsize=_TEXT)
    axes.set_ylabel("best beta (hollow: not distinguishable from 1)", fontsize=_TEXT)
    axes.legend(fontsize=_TEXT, frameon=False)


def _heat_maps(rows: Sequence[dict]) -> Figure | None:
    """Draw one panel per arm: depth down, length across, the share found as colour and number."""
    found = [row for row in rows if row["probe"] == "niah" and row["at"] is not None]
    if not found:
        return None
    arms = _arms(found)
    lengths = sorted({row["length"] for row in found})
    depths = sorted({row["at"] for row in found}, key=float)
    across = min(len(arms), _COLUMNS)
    down = -(-len(arms) // across)
    size = (1.6 + across * max(2.0, 0.62 * len(lengths)), 0.9 + down * max(1.7, 0.26 * len(depths) + 0.7))
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharey=True)
    values = {(row["model"], row["arm"], row["length"], row["at"]): row["value"] for row in found}
    for panel, arm in zip(grid.flat, arms):
        shares = [[values.get((*arm, length, depth), float("nan")) for length in lengths] for depth in depths]
        panel.grid(False)
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                # NaN: this length was measured for another model only
                if share == share:
                    # contrast with cividis, which is the same on a dark page
                    colour = "#111111" if share > 0.55 else "#ffffff"
                    panel.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=_TEXT - 1, color=colour)
        panel.set_title(_wrapped(_label(arm, arms)), fontsize=_TEXT)
        panel.set_xticks(range(len(lengths)), _ticks(lengths, found, arm[0]), fontsize=_TEXT - 1)
        panel.set_yticks(range(len(depths)), [f"{100 * float(depth):.0f} %" for depth in depths], fontsize=_TEXT - 1)
    for panel in grid.flat[len(arms) :]:
        panel.set_axis_off()
    for row in grid:
        row[0].set_ylabel("depth of the needle", fontsize=_TEXT)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30)
    bar.set_label(f"share found ({min(row['n'] for row in found)} trials per cell)", fontsize=_TEXT)
    bar.ax.tick_params(labelsize=_TEXT - 1)
    return figure


def _accuracies(rows: Sequence[dict]) -> Figure | None:
    kinds = [kind for kind in KINDS if any(row["probe"] == kind for row in rows)]
    panels = {
        kind: [row for row in rows if row["probe"] == kind and row["metric"] == "accuracy" and row["at"] is None]
        for kind in kinds
    }
    return _curves(panels, "share correct", limits=(-0.03, 1.03)) if panels else None


def _perplexity(rows: Sequence[dict]) -> Figure | None:
    found = [row for row in rows if row["probe"] == "perplexity" and row["at"] is None]
    return _curves({"": found}, "perplexity of whole windows", log=True) if found else None


def _attention(rows: Sequence[dict]) -> Figure | None:
    names = {"near, mean": "mean over layers and heads", "near, best head": "best head"}
    panels = {
        title: [row for row in rows if row["probe"] == "attention" and row["metric"] == metric]
        for metric, title in names.items()
    }
    if not any(panels.values()):
        return None
    figure = _curves(panels, "attention on the needle", log=True)
    uniform = sorted({(row["length"], row["value"]) for row in rows if row["metric"] == "uniform"})
    for panel in figure.axes:
        panel.plot(*zip(*uniform), color="#999999", linewidth=1)
        panel.annotate("uniform", uniform[0], fontsize=_TEXT - 1, color="#777777", va="bottom")
    return figure


def _curves(
    panels: dict[str, list[dict]], label: str, *, limits: tuple[float, float] | None = None, log: bool = False
) -> Figure:
    """Draw one panel per title and one line per arm over length; bars are Wilson intervals or one standard error."""
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(1.5 + 2.9 * across, 1.4 + 2.4 * down), squeeze=False, layout="constrained", sharey=True
    )
    every = [row for found in panels.values() for row in found]
    arms = _arms(every)
    lengths = sorted({row["length"] for row in every})
    for panel, (title, found) in zip(grid.flat, panels.items()):
        for i, arm in enumerate(arms):
            line = sorted((row for row in found if (row["model"], row["arm"]) == arm), key=lambda row: row["length"])
            # slightly offset, so that the bars of equal values do not coincide
            x = [row["length"] * 2 ** (0.03 * (i - (len(arms) - 1) / 2)) for row in line]
            values = [row["value"] for row in line]
            panel.errorbar(x, values, yerr=_bars(line), **_style(arm, arms), label=_label(arm, arms))
        _length_axis(panel, lengths, every)
        panel.set_title(title, fontsize=_TEXT + 1)
        if limits:
            panel.set_ylim(*limits)
        _tidy(panel)
    for panel in grid.flat[len(panels) :]:
        panel.set_axis_off()
    if log:
        _log_axis(grid[0, 0], [row["value"] for row in every])
    for row in grid:
        row[0].set_ylabel(label, fontsize=_TEXT)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    # beside a single panel the legend would take most of the width
    place = "outside right upper" if across > 1 else "outside upper left"
    figure.legend(handles, labels, loc=place, fontsize=_TEXT, frameon=False)
    return figure


def _positions(rows: Sequence[dict]) -> Figure | None:
    """Draw perplexity along the longest windows of each model."""
    found = [row for row in rows if row["probe"] == "perplexity" and row["at"] is not None]
    if not found:
        return None
    longest = {
        name: max(row["length"] for row in found if row["model"] == name) for name in {r["model"] for r in found}
    }
    arms = _arms(found)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for arm in arms:
        line = [row for row in found if (row["model"], row["arm"], row["length"]) == (*arm, longest[arm[0]])]
        borders = [tuple(map(int, row["at"].split("-"))) for row in line]
        x = [(start + stop) / 2 for start, stop in borders]
        label = f"{_label(arm, arms)}, {longest[arm[0]]:,} tokens"
        axes.errorbar(x, [row["value"] for row in line], yerr=_bars(line), **_style(arm, arms), label=label)
    for trained in {row["trained_length"] for row in found}:
        axes.axvline(trained, color="#777777", linestyle=":", linewidth=1)
    _log_axis(axes, [row["value"] for row in found])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("position in the window", fontsize=_TEXT)
    axes.set_ylabel("perplexity at that position", fontsize=_TEXT)
    figure.legend(loc="outside right upper", fontsize=_TEXT, frameon=False)
    _tidy(axes)
    return figure


def _arms(rows: Sequence[dict]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["model"], row["arm"]) for row in rows))


def _label(arm: tuple[str, str], arms: list[tuple[str, str]]) -> str:
    """Return the arm's label; with several models, after the end of the model's name, where checkpoint names differ."""
    model, name = arm
    return name if len({model for model, _ in arms}) == 1 else f"{end_of(model, 24)}, {name}"


def _style(arm: tuple[str, str], arms: list[tuple[str, str]]) -> dict:
    models = list(dict.fromkeys(model for model, _ in arms))
    style = _STYLES[models.index(arm[0]) % len(_STYLES)]
    return {
        "color": _COLOURS[arm[1]],
        "marker": _MARKERS[arm[1]],
        "linestyle": style,
        "markersize": 4,
        "linewidth": 1.2,
        "elinewidth": 0.8,
        "capsize": 2,
    }


def _bars(line: Sequence[dict]) -> list[list[float]] | None:
    if all(row["low"] is not None for row in line):
        # rounding must not make a length negative
        low = [max(0.0, row["value"] - row["low"]) for row in line]
        return [low, [max(0.0, row["high"] - row["value"]) for row in line]]
    if any(row["stderr"] is not None for row in line):
        errors = [row["stderr"] or 0.0 for row in line]
        return [errors, errors]
    return None


def _length_axis(axes: Axes, lengths: list[int], rows: Sequence[dict]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, _ticks(lengths, rows, rows[0]["model"]), fontsize=_TEXT - 1)
    axes.minorticks_off()
    for trained in {row["trained_length"] for row in rows}:
        axes.axvline(trained, color="#777777", linestyle=":", linewidth=1)


def _log_axis(axes: Axes, values: list[float]) -> None:
    """Use a logarithmic axis with plain numbers if the values span more than a factor of five."""
    if max(values) < 5 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _ticks(lengths: list[int], rows: Sequence[dict], model: str) -> list[str]:
    """Return labels in tokens, with the multiple of the trained length below if there is one trained length."""
    multiples = {row["length"]: row["multiple"] for row in rows if row["model"] == model}
    one = len({row["trained_length"] for row in rows}) == 1
    return [f"{length:,}\n{multiples[length]}" if one and length in multiples else f"{length:,}" for length in lengths]


def _caption(document: dict, figure: Figure) -> str:
    settings, about = document["settings"], document["about"]
    models = f"{settings['models'][0]['name']}; " if len(settings["models"]) == 1 else ""
    text = f"{models}text: {settings['text']['name']}; {about['device']}, {settings['dtype']}; {about['date'][:10]}"
    return textwrap.fill(text, int(figure.get_figwidth() * 16))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 26))


def _tidy(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_TEXT - 1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
