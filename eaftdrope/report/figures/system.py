"""A metric by length of the context, one line for each state of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .style import MARKERS, SERIES, legend_above, new_figure, styled


def lengths_figure(series: Mapping[str, Sequence[tuple[int, float]]], what: str) -> Figure:
    """Draw (length, value) of each state."""
    with styled():
        figure, axes = new_figure(3.1)
        for number, (state, points) in enumerate(series.items()):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*points), color=colour, marker=marker, markersize=3, label=state)
        lengths = sorted({length for points in series.values() for length, _ in points})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of context")
        axes.set_ylabel(what)
        legend_above(axes)
    return figure
