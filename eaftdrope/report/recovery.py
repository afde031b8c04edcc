"""The curve of a recalibration: perplexity over tokens, beside the original model's."""

from __future__ import annotations

import math
import os
from pathlib import Path

_NOW, _ORIGINAL = "#0072B2", "#D55E00"
_TEXT = 9


def draw_recovery(path: Path, *, original: float, points: list[tuple[int, float]], tokens: int) -> None:
    """Write the figure.

    Args:
        path: a .png.
        original: nats a token of the original model.
        points: (tokens trained on, nats a token), in order.
        tokens: how many tokens each measurement scores.
    """
    import matplotlib

    # without a display
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    reference = math.exp(original)
    axes.plot([seen for seen, _ in points], [math.exp(nll) for _, nll in points], color=_NOW, marker="o", markersize=3)
    axes.axhline(reference, color=_ORIGINAL, linestyle="--", linewidth=1)
    last_tokens, last = points[-1]
    axes.annotate(
        f"original, with its rotary embedding: {reference:.2f}",
        (0, reference),
        xytext=(4, 4),
        textcoords="offset points",
        color=_ORIGINAL,
        fontsize=_TEXT,
    )
    axes.annotate(
        f"{math.exp(last):.2f}: {math.exp(original - last):.1%} recovered",
        (last_tokens, math.exp(last)),
        xytext=(0, 10),
        textcoords="offset points",
        horizontalalignment="right",
        color=_NOW,
        fontsize=_TEXT,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of recalibration", fontsize=_TEXT)
    axes.set_ylabel(f"perplexity of {tokens:,} held-out tokens", fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    os.replace(partial, path)
