"""How clear each change is: the change of every metric, in its own standard errors."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.figure import Figure

from .style import GREEN, MUTED, RULE, VERMILION, WIDTH, new_figure, styled

# Beyond this a change is as clear as it gets, and the others should not be squeezed for it.
_FAR = 8.0


def changes_figure(changes: Sequence[tuple[str, float]]) -> Figure:
    """One line a metric, better to the right; inside the band of two standard errors there is no clear change.

    Args:
        changes: (metric, change / its standard error, positive where it is better).
    """
    with styled():
        figure, axes = new_figure(0.9 + 0.34 * len(changes), WIDTH)
        axes.axvspan(-2, 2, color=RULE, alpha=0.55, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for y, (_, change) in enumerate(changes):
            x = max(-_FAR, min(_FAR, change))
            clear = abs(change) > 2
            colour = (GREEN if change > 0 else VERMILION) if clear else MUTED
            axes.plot([x - 2 if abs(x) < _FAR else x, x + 2 if abs(x) < _FAR else x], [y, y], color=colour)
            # what lies further out than the axis reaches is an arrow
            marker = "o" if abs(change) < _FAR else (">" if change > 0 else "<")
            axes.plot([x], [y], marker, color=colour, markersize=6, fillstyle="full" if clear else "none")
        axes.set_yticks(range(len(changes)), [textwrap.fill(name, 24) for name, _ in changes])
        axes.set_ylim(len(changes) - 0.4, -0.6)
        axes.set_xlim(-_FAR - 2.2, _FAR + 2.2)
        axes.set_xticks([-8, -2, 0, 2, 8], ["−8", "−2", "0", "2", "8"])
        # of the figure: names may leave the panel too narrow for it
        figure.supxlabel("← worse | change in its standard errors | better →", fontsize=9)
        axes.grid(False)
    return figure
