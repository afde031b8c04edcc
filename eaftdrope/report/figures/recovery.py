"""The recovery curve of a recalibration: perplexity over tokens, with that of the original model."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from eaftdrope.files import replacing

from .style import BLUE, VERMILION, new_figure, plt, styled


def recovery_figure(*, original: float, points: list[tuple[int, float]], tokens: int) -> Figure:
    """Draw the curve.

    Args:
        original: nats per token of the original model.
        points: (tokens trained on, nats per token), in order.
        tokens: number of tokens that each measurement scores.
    """
    with styled():
        figure, axes = new_figure(3.1)
        reference = math.exp(original)
        axes.plot(
            [seen for seen, _ in points], [math.exp(nll) for _, nll in points], color=BLUE, marker="o", markersize=3
        )
        axes.axhline(reference, color=VERMILION, linestyle="--", linewidth=1)
        last_tokens, last = points[-1]
        axes.annotate(
            f"original, with its rotary embedding: {reference:.2f}",
            (0, reference),
            xytext=(4, 4),
            textcoords="offset points",
            color=VERMILION,
        )
        axes.annotate(
            f"{math.exp(last):.2f}: {math.exp(original - last):.1%} recovered",
            (last_tokens, math.exp(last)),
            xytext=(0, 10),
            textcoords="offset points",
            horizontalalignment="right",
            color=BLUE,
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens of recalibration")
        axes.set_ylabel(f"perplexity of {tokens:,} held-out tokens")
    return figure


def draw_recovery(path: Path, *, original: float, points: list[tuple[int, float]], tokens: int) -> None:
    """Write the figure as a .png, whole or not at all."""
    figure = recovery_figure(original=original, points=points, tokens=tokens)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
