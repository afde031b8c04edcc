"""Training curves from metrics.jsonl, and probes measured during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import BLUE, GREEN, INK, MUTED, ORANGE, SERIES, VERMILION, legend_above, new_figure, styled

# The curve of a long training is reduced to this many means, so that the page stays small.
POINTS = 300


class Curve(NamedTuple):
    """Specification of a figure: name, axis label, description, and (label, key of metrics.jsonl, colour) of each line."""

    name: str
    axis: str
    description: str
    lines: tuple[tuple[str, str, str], ...]


CURVES = (
    Curve(
        "loss",
        "nats per token",
        "Cross-entropy of the training batches, without the gate; held-out cross-entropy where it was measured.",
        (
            ("training", "eaft/cross_entropy", BLUE),
            ("held out", "eval_loss", VERMILION),
            ("entropy of the model", "entropy", MUTED),
        ),
    ),
    Curve(
        "gate_mean",
        "gate",
        "Mean gate, and the share of tokens whose gate is nearly closed (below 0.05).",
        (("mean gate", "eaft/gate_mean", BLUE), ("share below 0.05", "eaft/gate_low_share", ORANGE)),
    ),
    Curve(
        "groups",
        "nats per token",
        "Cross-entropy of the tokens where the model was uncertain (entropy of at least 2 nats) and confident (at most 0.5). "
        "Plain training drives the second to zero; there the gate reduces the weight.",
        (
            ("entropy ≥ 2", "eaft/high_entropy_loss", BLUE),
            ("entropy ≤ 0.5", "eaft/low_entropy_loss", VERMILION),
        ),
    ),
    Curve(
        "conflicts",
        "share of tokens",
        "Share of confident conflicts: the model is confident (entropy below 0.5 nats), but not of the label (probability "
        "below 0.1).",
        (("confident conflicts", "eaft/conflict_share", VERMILION),),
    ),
    Curve("learning_rate", "learning rate", "Learning rate.", (("learning rate", "learning_rate", GREEN),)),
)


def series(metrics: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of a key, averaged over neighbouring steps if there are more than `POINTS`."""
    found = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    together = -(-len(steps) // POINTS) or 1
    starts = range(0, len(steps), together)
    means = [np.array([part[i : i + together].mean() for i in starts]) for part in (steps, values)]
    return means[0], means[1]


def curve_figure(curve: Curve, metrics: Sequence[dict]) -> Figure | None:
    """Draw the curve over the steps; None if none of its keys was logged."""
    lines = [(label, *series(metrics, key), colour) for label, key, colour in curve.lines]
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return None
    with styled():
        figure, axes = new_figure()
        for label, steps, values, colour in lines:
            # short series: markers make a single value visible
            axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 12 else "", markersize=3.5)
        _step_axis(axes)
        axes.set_ylabel(curve.axis)
        if all(values.min() >= 0 for _, _, values, _ in lines):
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            legend_above(axes)
    return figure


def run_curves(runs: Mapping[str, Sequence[dict]], key: str, axis: str) -> Figure | None:
    """Draw one key of metrics.jsonl over the steps, one line per run; None if no run logged it."""
    lines = {label: series(metrics, key) for label, metrics in runs.items()}
    if not any(len(steps) for steps, _ in lines.values()):
        return None
    with styled():
        figure, axes = new_figure(3.2)
        for i, (label, (steps, values)) in enumerate(lines.items()):
            colour, style = SERIES[i % len(SERIES)], ("-", "--", ":", "-.")[i % 4]
            axes.plot(
                steps, values, style, color=colour, label=label, marker="o" if len(steps) < 12 else "", markersize=3.5
            )
        _step_axis(axes)
        axes.set_ylabel(axis)
        legend_above(axes, columns=2)
    return figure


def gate_over_time(metrics: Sequence[dict]) -> Figure | None:
    """Draw the distribution of the gates over the steps, as the shares of ten bands; None for fewer than two logs."""
    keys = [f"eaft/gate_hist_{i:02}" for i in range(10)]
    found = [row for row in metrics if all(row.get(key) is not None for key in keys)]
    if len(found) < 2:
        return None
    bands = [series(found, key) for key in keys]
    with styled():
        figure, axes = new_figure()
        shares = np.array([values for _, values in bands])
        colours = [(0.0, 0.447, 0.698, 0.08 + 0.092 * i) for i in range(10)]
        axes.stackplot(bands[0][0], 100 * shares / shares.sum(axis=0), colors=colours, linewidth=0)
        _step_axis(axes)
        axes.set(ylabel="share of tokens, %", ylim=(0, 100), xlim=(bands[0][0][0], bands[0][0][-1]))
        axes.grid(False)
    return figure


def probes_over_time(name: str, points: Sequence[tuple[int, float, float | None]], kind: str) -> Figure:
    """Draw a metric before, during and after training; bars are one standard error.

    Args:
        points: (step, value, standard error), in order.
        kind: of the score; a share is shown in percent.
    """
    factor = 100 if kind == "share" else 1
    steps, values, errors = zip(*points)
    with styled():
        figure, axes = new_figure()
        axes.errorbar(
            steps,
            [factor * value for value in values],
            yerr=[factor * (error or 0.0) for error in errors],
            color=BLUE,
            ecolor=MUTED,
            elinewidth=1,
            capsize=2,
            marker="o",
            markersize=4,
        )
        axes.axhline(factor * values[0], color=INK, linewidth=0.8, linestyle=":")
        _step_axis(axes)
        axes.set_ylabel(name + (", %" if kind == "share" else ""))
    return figure


def position_figure(rows: Sequence[tuple[str, float, float]]) -> Figure:
    """Draw the loss over the position in the row, in the first and in the last quarter of the training.

    Args:
        rows: (positions, loss at first, loss at last), in order.
    """
    labels, first, last = zip(*rows)
    with styled():
        figure, axes = new_figure()
        for name, losses, colour in (("first quarter", first, MUTED), ("last quarter", last, BLUE)):
            axes.plot(range(len(labels)), losses, color=colour, label=name, marker="o", markersize=3.5)
        axes.set_xticks(range(len(labels)), [label.split()[0] for label in labels])
        axes.set(xlabel="position, from", ylabel="nats per token")
        legend_above(axes)
    return figure


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
