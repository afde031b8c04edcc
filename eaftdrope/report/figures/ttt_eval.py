"""Figures of `eaftdrope ttt eval`: loss by position, the difference to full attention, and latency by context position.

Colour and marker encode the arm, so that colour vision is not needed. A dotted line marks the window.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eaftdrope.evaluate.ttt.arms import ARMS
from eaftdrope.evaluate.ttt.latency import READERS, PositionCost
from eaftdrope.evaluate.ttt.positions import PositionLosses
from eaftdrope.evaluate.ttt.results import Measured
from eaftdrope.evaluate.ttt.table import READER_TITLES

from .style import BLUE, GREEN, INK, MUTED, ORANGE, PINK, SKY, WIDTH, legend_above, new_figure, styled

_LOOK = dict(
    zip(
        ARMS,
        (
            (INK, "o", "-"),
            (MUTED, "s", ":"),
            (ORANGE, "D", "-"),
            (GREEN, "^", "-"),
            (PINK, "v", "-"),
            (PINK, "P", "--"),
            (BLUE, "X", "-"),
            (SKY, "s", "--"),
        ),
        strict=True,
    )
)
_READER_LOOK = dict(zip(READERS, ((INK, "o"), (ORANGE, "D"), (BLUE, "X")), strict=True))
# A window without its sink may lose ten times what the others do: it would flatten them.
_TALL = 3.0


def ttt_figures(found: Measured, window: int, chunk: int) -> dict[str, Figure]:
    """Return the figures by name, of what was measured."""
    figures = {}
    with styled():
        if found.losses:
            figures["ttt_loss_by_position"] = _losses(found.losses, window)
        if "full" in found.losses and len(found.losses) > 1:
            figures["ttt_difference_to_full"] = _differences(found.losses, window)
        if found.costs:
            figures["ttt_latency"] = _latency(found.costs, chunk)
    return figures


def _losses(losses: dict[str, PositionLosses], window: int) -> Figure:
    figure, axes = new_figure(3.6)
    for arm, one in losses.items():
        axes.plot(_middles(one), [score.value for score in one.by_bin()], **_style(arm), label=ARMS[arm].title)
    _limit(axes, {arm: [score.value for score in one.by_bin()] for arm, one in losses.items()})
    _positions(axes, losses, window)
    axes.set_ylabel("nats per token")
    legend_above(axes, columns=2)
    return figure


def _differences(losses: dict[str, PositionLosses], window: int) -> Figure:
    figure, axes = new_figure(3.6)
    full, values = losses["full"], {}
    others = [arm for arm in losses if arm != "full"]
    for number, arm in enumerate(others):
        one = losses[arm]
        differences = [one.minus(full, a, b) for a, b in pairwise(one.edges)]
        values[arm] = [difference.value for difference in differences]
        # slightly offset, so that the bars of equal values do not coincide
        x = [middle * 2 ** (0.05 * (number - (len(others) - 1) / 2)) for middle in _middles(one)]
        errors = [difference.stderr or 0.0 for difference in differences]
        axes.errorbar(x, values[arm], yerr=errors, **_style(arm), elinewidth=0.8, capsize=2, label=ARMS[arm].title)
    axes.axhline(0, color=INK, linewidth=0.8)
    _limit(axes, values)
    _positions(axes, losses, window)
    axes.set_ylabel("nats per token more than full attention")
    legend_above(axes, columns=2)
    return figure


def _limit(axes: Axes, values: dict[str, list[float]]) -> None:
    """Let the plain window run out of the panel where it would flatten the others."""
    rest = [value for arm, line in values.items() if arm != "window" for value in line]
    if "window" not in values or not rest:
        return
    low, high = min(rest), max(rest)
    if max(values["window"]) - low > _TALL * max(high - low, 1e-3):
        axes.set_ylim(low - 0.15 * (high - low), high + 0.6 * (high - low))
        words = f"{ARMS['window'].title}: up to {max(values['window']):.2f}"
        axes.text(0.99, 0.98, words, transform=axes.transAxes, ha="right", va="top", color=MUTED, fontsize=8.5)


def _latency(costs: dict[int, dict[str, PositionCost]], chunk: int) -> Figure:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * WIDTH, 3.0), layout="constrained")
    _cost_lines(left, costs, lambda cost: 1e3 * cost.chunk_seconds, f"ms per chunk of {chunk:,} tokens")
    _cost_lines(right, costs, lambda cost: 1e3 * cost.token_seconds, "ms per decoded token")
    legend_above(left)
    return figure


def _cost_lines(
    axes: Axes, costs: dict[int, dict[str, PositionCost]], value: Callable[[PositionCost], float], label: str
) -> None:
    positions = sorted(costs)
    for reader in READERS:
        line = [(position, value(costs[position][reader])) for position in positions if reader in costs[position]]
        colour, marker = _READER_LOOK[reader]
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=4, label=READER_TITLES[reader])
    axes.set_xscale("log", base=2)
    axes.set_xticks(positions, [f"{position:,}" for position in positions])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context position")
    axes.set_ylabel(label)


def _positions(axes: Axes, losses: dict[str, PositionLosses], window: int) -> None:
    edges = next(iter(losses.values())).edges
    axes.set_xscale("log", base=2)
    ticks = [edge for edge in edges if edge]
    axes.set_xticks(ticks, [f"{edge:,}" for edge in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(window, color=MUTED, linestyle=":", linewidth=1)
    axes.set_xlabel("position (dotted: the window)")


def _middles(losses: PositionLosses) -> list[float]:
    """The middle of each bin on a logarithmic axis; that of the first, which begins at 0, is half of its end."""
    return [(a * b) ** 0.5 if a else b / 2 for a, b in pairwise(losses.edges)]


def _style(arm: str) -> dict:
    colour, marker, line = _LOOK[arm]
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.3}
