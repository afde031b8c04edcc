"""The Pareto figure of a comparison: gained on the target against kept in general, every arm with its seeds' spread."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import INK, MARKERS, MUTED, SERIES, new_figure, styled


def pareto_figure(document: dict) -> Figure:
    """Target across, general up; both axes are turned so that up and right are better.

    Small marks are single seeds, the large one is their mean, its bars are one standard deviation over seeds.

    Args:
        document: compare.json.
    """
    target, general = document["target"], document["general"]
    known = [*document["base"], *(score for arm in document["arms"] for score in arm["scores"])]
    better = {score["metric"]: score["better"] for score in known}
    base = {score["metric"]: score["value"] for score in document["base"]}
    with styled():
        figure, axes = new_figure(3.9)
        for i, row in enumerate(document["table"]):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            _arm(axes, document, row, colour, marker)
        if target in base and general in base:
            axes.plot(base[target], base[general], marker="*", color=INK, markersize=11, linestyle="none", label="base")
            axes.axhline(base[general], color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"target: {target} (right is better)")
        axes.set_ylabel(f"general: {general} (up is better)")
        if better[target] == "lower":
            axes.invert_xaxis()
        if better[general] == "lower":
            axes.invert_yaxis()
        axes.margins(0.12)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.4)
    return figure


def _arm(axes: Axes, document: dict, row: dict, colour: str, marker: str) -> None:
    points = []
    for arm in document["arms"]:
        values = {score["metric"]: score["value"] for score in arm["scores"]}
        if arm["label"] == row["label"] and {document["target"], document["general"]} <= values.keys():
            points.append((values[document["target"]], values[document["general"]]))
    if points:
        x, y = zip(*points)
        axes.plot(x, y, marker=marker, color=colour, markersize=3.5, linestyle="none", alpha=0.55)
    across, up = row["target"], row["general"]
    axes.errorbar(
        across["mean"],
        up["mean"],
        # one seed has no spread
        xerr=across["sd"],
        yerr=up["sd"],
        color=colour,
        marker=marker,
        markersize=7,
        linewidth=1.2,
        capsize=2,
        label=row["label"],
        linestyle="none",
    )
