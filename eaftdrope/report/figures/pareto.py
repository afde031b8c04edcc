"""The Pareto figure of a comparison: target against general metric, each arm with its spread over seeds."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eaftdrope.evaluate.table import by_metric

from ..words import score_of
from .style import INK, MARKERS, MUTED, SERIES, new_figure, styled


def pareto_figure(document: dict) -> Figure:
    """Draw the target across and the general metric up, both oriented so that up and right are better.

    Small markers are single seeds; a large marker is their mean, with bars of one standard deviation over seeds.

    Args:
        document: compare.json.
    """
    target, general = document["target"], document["general"]
    base = by_metric([score_of(row) for row in document["base"]])
    with styled():
        figure, axes = new_figure(3.9)
        for i, row in enumerate(document["table"]):
            _arm(axes, document, row, i)
        start = base[target].value, base[general].value
        axes.plot(*start, marker="*", color=INK, markersize=11, linestyle="none", label="before training")
        axes.axhline(start[1], color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"target: {target} (right is better)")
        axes.set_ylabel(f"general: {general} (up is better)")
        if base[target].better == "lower":
            axes.invert_xaxis()
        if base[general].better == "lower":
            axes.invert_yaxis()
        axes.margins(0.12)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.4)
    return figure


def _arm(axes: Axes, document: dict, row: dict, i: int) -> None:
    colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
    names = document["target"], document["general"]
    found = [
        by_metric([score_of(one) for one in arm["scores"]]) for arm in document["arms"] if arm["label"] == row["label"]
    ]
    # an arm that has not been measured has no scores
    points = [[scores[name].value for name in names] for scores in found if scores.keys() >= {*names}]
    if points:
        axes.plot(*zip(*points), marker=marker, color=colour, markersize=3.5, linestyle="none", alpha=0.55)
    across, up = row["target"], row["general"]
    axes.errorbar(
        across["mean"],
        up["mean"],
        # one seed has no spread
        xerr=across["sd"],
        yerr=up["sd"],
        color=colour,
        marker=marker,
        # of decreasing size, so that arms with equal results (constant and none, under AdamW) stay visible
        markersize=max(5.0, 10.0 - 1.5 * i),
        linewidth=1.2,
        capsize=2,
        label=row["label"],
        linestyle="none",
    )
