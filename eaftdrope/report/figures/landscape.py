"""The landscape of tokens: how many at which entropy of the model and which probability of the label.

The figure of the paper (arXiv 2601.02151, Figure 1b): text that the model writes itself lies along the diagonal, and
foreign text has a second crowd in the lower left corner, where the model is sure of something else.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .style import BLUE, INK, MUTED, ORANGE, SKY, VERMILION, legend_above, new_figure, styled

# Opacity grows with the count, so that few is faint on a light and on a dark page.
_FEW_TO_MANY = LinearSegmentedColormap.from_list(
    "few to many",
    [(0.0, (0.2, 0.55, 0.82, 0.4)), (0.5, (0.52, 0.40, 0.72, 0.85)), (1.0, (0.88, 0.39, 0.0, 1.0))],
)


def landscape_figure(landscape: dict, title: str = "", *, most: int | None = None) -> Figure:
    """Counts as colour (logarithmic), the confident conflicts' corner outlined, the two groups of entropy marked.

    Args:
        landscape: what `Landscape.to_dict()` returns.
        title: above the panel.
        most: the count that has the strongest colour, for figures that are compared; by default the highest.
    """
    from eaftdrope.loss.statistics import CONFLICT_ENTROPY, CONFLICT_PROBABILITY

    density = np.asarray(landscape["density"], dtype=float)
    width, step = landscape["entropy_width"], landscape["probability_width"]
    rows = np.nonzero(density.sum(axis=1))[0]
    shown = min(len(density), max(int(rows[-1]) + 2 if len(rows) else 1, round(3 / width)))
    counts = np.ma.masked_equal(density[:shown].T, 0)
    with styled():
        figure, axes = new_figure(3.4)
        image = axes.imshow(
            counts,
            origin="lower",
            extent=(0, shown * width, 0, step * density.shape[1]),
            aspect="auto",
            interpolation="none",
            cmap=_FEW_TO_MANY,
            norm=LogNorm(1, max(2, most or density.max(initial=2))),
        )
        corner = [0, CONFLICT_ENTROPY, CONFLICT_ENTROPY], [CONFLICT_PROBABILITY, CONFLICT_PROBABILITY, 0]
        axes.grid(False)
        axes.plot(*corner, color=INK, linewidth=1.4)
        axes.axvline(2, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.axvline(CONFLICT_ENTROPY, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        # no token is uncertain and likely, so nothing is hidden up there
        share = f"{100 * landscape['conflicts'] / max(1, landscape['tokens']):.1f} %"
        axes.text(
            0.98, 0.96, f"confident conflicts\n(in the corner): {share}", transform=axes.transAxes, ha="right", va="top"
        )
        axes.set(xlabel="entropy of the model's prediction, nats", ylabel="probability of the label", xlim=(0, None))
        axes.set_ylim(0, 1)
        axes.set_title(title, loc="left")
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=28)
        bar.set_label("tokens")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(LogLocator())
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        bar.ax.minorticks_off()
    return figure


def joined(windows: list[dict]) -> dict:
    """Neighbouring windows of landscape.jsonl as one: what a figure of them needs."""
    first, last = windows[0], windows[-1]
    return {
        "first_step": first["first_step"],
        "step": last["step"],
        "density": np.sum([window["density"] for window in windows], axis=0).tolist(),
        "gate": np.sum([window["gate"] for window in windows], axis=0).tolist(),
        **{key: first[key] for key in ("entropy_width", "probability_width")},
        **{key: sum(window[key] for window in windows) for key in ("tokens", "conflicts")},
    }


def gate_figure(landscapes: dict[str, dict]) -> Figure:
    """Share of the tokens at each gate, one outline a landscape; the last bin holds what is 0.95 and over."""
    with styled():
        figure, axes = new_figure(2.7)
        for (label, landscape), colour, style in zip(
            landscapes.items(), (BLUE, VERMILION, ORANGE, SKY), ("-", "--", ":", "-."), strict=False
        ):
            counts = np.asarray(landscape["gate"], dtype=float)
            shares = 100 * counts / max(1, counts.sum())
            axes.stairs(shares, np.linspace(0, 1, len(counts) + 1), color=colour, linestyle=style, label=label)
        axes.set(xlabel="gate", ylabel="share of tokens, %", xlim=(0, 1), ylim=(0, None))
        if len(landscapes) > 1:
            legend_above(axes, columns=2)
    return figure
