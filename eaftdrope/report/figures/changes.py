"""Figure of the clarity of changes: each metric's change in units of its margin."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.figure import Figure

from .style import GREEN, MUTED, RULE, VERMILION, WIDTH, new_figure, styled

# Limit of the axis: a larger change is drawn at the edge, so that it does not compress the others.
_FAR = 4.0


def changes_figure(changes: Sequence[tuple[str, float]]) -> Figure:
    """Draw one row per metric, better to the right; inside the band a change is neither better nor worse.

    Args:
        changes: (metric, change / its margin, positive for an improvement).
    """
    with styled():
        figure, axes = new_figure(0.9 + 0.34 * len(changes), WIDTH)
        axes.axvspan(-1, 1, color=RULE, alpha=0.55, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for y, (_, change) in enumerate(changes):
            x = max(-_FAR, min(_FAR, change))
            clear = abs(change) > 1
            colour = (GREEN if change > 0 else VERMILION) if clear else MUTED
            axes.plot([x - 1 if abs(x) < _FAR else x, x + 1 if abs(x) < _FAR else x], [y, y], color=colour)
            # an arrow marks a value beyond the axis
            marker = "o" if abs(change) < _FAR else (">" if change > 0 else "<")
            axes.plot([x], [y], marker, color=colour, markersize=6, fillstyle="full" if clear else "none")
        axes.set_yticks(range(len(changes)), [textwrap.fill(name, 24) for name, _ in changes])
        axes.set_ylim(len(changes) - 0.4, -0.6)
        axes.set_xlim(-_FAR - 1.1, _FAR + 1.1)
        axes.set_xticks([-4, -1, 0, 1, 4], ["−4", "−1", "0", "1", "4"])
        # a label of the figure: long names may leave the panel too narrow for it
        figure.supxlabel("← worse | change in units of its margin | better →", fontsize=9)
        axes.grid(False)
    return figure
