"""Figures of recursive language models: `eaftdrope rlm bench`, sub-calls by strategy, and the probe `rlm_tasks`.

Colour and marker encode the arm, so that colour vision is not needed. Bars are 95 % Wilson intervals unless stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from eaftdrope.evaluate.rlm.table import Cells, percentile, share
from eaftdrope.evaluate.rlm.trials import ARMS, CEILING, FLOOR, STEPS

from .style import BLUE, GREEN, INK, MUTED, ORANGE, PINK, SERIES, SKY, WIDTH, new_figure, styled

_LOOK = dict(
    zip(
        ARMS,
        (
            (BLUE, "o", "-"),
            (INK, "s", "-"),
            (ORANGE, "D", "-"),
            (PINK, "v", "-"),
            (GREEN, "^", "-"),
            (MUTED, "x", ":"),
            (SKY, "*", ":"),
        ),
        strict=True,
    )
)
_STEP_COLOURS = dict(zip(STEPS, (PINK, ORANGE, GREEN, BLUE), strict=True))
# panels in a row
_COLUMNS = 3
# upper ends of the groups of sub-calls; the last group is open
_CALL_GROUPS = (0, 1, 3, 10, 30, 100, 300, 1_000, 10_000)

Shares = Mapping[str, tuple[float, float, float]]


def bench_figures(cells: Cells) -> dict[str, Figure]:
    """Return the figures by name, of what was measured."""
    figures = {}
    with styled():
        if cells:
            figures["rlm_accuracy_by_length"] = _accuracies(cells)
        if any(arm == "rlm" for *_, arm in cells):
            figures["rlm_steps"] = _steps(cells)
        if any(arm not in (FLOOR, CEILING) for *_, arm in cells):
            figures["rlm_cost_by_length"] = _costs(cells)
    return figures


def _accuracies(cells: Cells) -> Figure:
    """Share right over length: one panel per task, one line per arm."""
    figure, panels = _panels(_tasks(cells), 2.5)
    for task, panel in panels.items():
        for arm, lengths, offsets in _lines(cells, task):
            shares = [share(cells[task, chars, arm], "right") for chars in lengths]
            panel.errorbar(offsets, *_points(shares), **_style(arm), label=arm)
        panel.set_ylim(-3, 103)
        _length_axis(panel, cells)
    _label(figure, panels, "right, %")
    return figure


def _steps(cells: Cells) -> Figure:
    """How far the roots of the RLM came: bars by task and length."""
    places = [(task, chars) for task, chars, arm in cells if arm == "rlm"]
    tasks = list(dict.fromkeys(task for task, _ in places))
    figure, panels = _panels(tasks, 2.2)
    for task, panel in panels.items():
        lengths = sorted(chars for name, chars in places if name == task)
        for number, step in enumerate(STEPS):
            shares = [share(cells[task, chars, "rlm"], step) for chars in lengths]
            values, yerr = _points(shares)
            x = np.arange(len(lengths)) + 0.2 * (number - 1.5)
            panel.bar(x, values, 0.18, yerr=yerr, color=_STEP_COLOURS[step], ecolor=INK, capsize=1.5, label=step)
        panel.set_xticks(range(len(lengths)), [_short(chars) for chars in lengths])
        panel.set_ylim(0, 103)
        panel.grid(axis="x", visible=False)
    _label(figure, panels, "of the trials, %")
    return figure


def _costs(cells: Cells) -> Figure:
    """Tokens per trial over length: median with a line to the 95th percentile."""
    figure, panels = _panels(_tasks(cells), 2.5)
    for task, panel in panels.items():
        for arm, lengths, offsets in _lines(cells, task):
            if arm in (FLOOR, CEILING):
                continue
            tokens = [[trial.tokens for trial in cells[task, chars, arm]] for chars in lengths]
            median = np.array([max(1, percentile(values, 0.5)) for values in tokens])
            tail = np.array([max(1, percentile(values, 0.95)) for values in tokens])
            panel.errorbar(offsets, median, yerr=[0 * median, tail - median], **_style(arm), label=arm)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.yaxis.set_minor_locator(NullLocator())
        _length_axis(panel, cells)
    _label(figure, panels, "tokens per trial")
    return figure


def sub_calls_figure(calls: Mapping[str, Sequence[int]]) -> Figure:
    """Runs by their number of sub-calls, in groups that grow, stacked by strategy.

    Args:
        calls: strategy -> sub-calls of each of its runs.
    """
    most = max(max(values) for values in calls.values())
    edges = [edge for edge, below in zip(_CALL_GROUPS, (-1, *_CALL_GROUPS)) if most > below]
    labels = [_group_label(a, b) for a, b in zip((-1, *edges), edges)]
    if most > edges[-1]:
        labels.append(f"over {edges[-1]:,}")
    with styled():
        figure, axes = new_figure(2.6)
        bottom = np.zeros(len(labels))
        for colour, (name, values) in zip(SERIES, calls.items()):
            found = np.bincount(np.searchsorted(edges, values), minlength=len(labels))
            axes.bar(range(len(labels)), found, 0.7, bottom=bottom, color=colour, label=name)
            bottom += found
        axes.set_xticks(range(len(labels)), labels)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        # a single bar does not fill the panel
        axes.set_xlim(-0.7, max(len(labels) - 0.3, 3.7))
        axes.set(xlabel="sub-calls of a run", ylabel="runs")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def _group_label(low: int, high: int) -> str:
    return f"{high:,}" if high - low == 1 else f"{low + 1:,}–{high:,}"


def steps_before_and_after(tasks: Mapping[str, tuple[Shares, Shares]]) -> Figure:
    """The steps of the probe `rlm_tasks`: shares before (hollow) and after training, one panel per task.

    Args:
        tasks: task -> (before, after), each step -> (share, low, high); a side that was not measured is empty.
    """
    with styled():
        figure, panels = _panels(list(tasks), 2.2)
        for task, panel in panels.items():
            for shares, label, colour, offset in zip(tasks[task], ("before", "after"), (MUTED, BLUE), (-0.2, 0.2)):
                if shares:
                    values, yerr = _points(list(shares.values()))
                    x = np.arange(len(shares)) + offset
                    panel.bar(x, values, 0.36, yerr=yerr, color=colour, ecolor=INK, capsize=2, label=label)
            names = list(tasks[task][0] or tasks[task][1])
            panel.set_xticks(range(len(names)), [name.replace(" a ", " a\n") for name in names])
            panel.set_ylim(0, 103)
            panel.grid(axis="x", visible=False)
        _label(figure, panels, "of the trials, %")
    return figure


# What the figures share


def _panels(tasks: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes]]:
    across = min(len(tasks), _COLUMNS)
    down = -(-len(tasks) // across)
    width = WIDTH if across == 1 else 0.4 + 2.9 * across
    size = (width, 0.5 + height * down)
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharey=True)
    for empty in grid.flat[len(tasks) :]:
        empty.set_axis_off()
    for task, panel in zip(tasks, grid.flat):
        panel.set_title(task)
    return figure, dict(zip(tasks, grid.flat))


def _label(figure: Figure, panels: Mapping[str, Axes], text: str) -> None:
    """The label of the shared axis, and one legend for all panels."""
    for panel in panels.values():
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(text)
    found: dict[str, object] = {}
    for panel in panels.values():
        found |= dict(zip(*reversed(panel.get_legend_handles_labels())))
    handles = list(found.values())
    narrow = len(panels) == 1
    figure.legend(handles, list(found), loc="outside upper left", ncols=4 if narrow else 8, columnspacing=1.2)


def _tasks(cells: Cells) -> list[str]:
    return list(dict.fromkeys(task for task, *_ in cells))


def _lines(cells: Cells, task: str) -> list[tuple[str, list[int], list[float]]]:
    """(arm, lengths, positions) of a task, slightly offset, so that the bars of equal values do not coincide."""
    lines = []
    for number, arm in enumerate(ARMS):
        lengths = sorted(chars for name, chars, one in cells if (name, one) == (task, arm))
        if lengths:
            lines.append((arm, lengths, [chars * 2 ** (0.12 * (number - 3)) for chars in lengths]))
    return lines


def _points(shares: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[list[float]]]:
    """Values in percent and the lengths of their bars; rounding must not make one negative."""
    values = [100 * value for value, _, _ in shares]
    low = [max(0.0, 100 * (value - low)) for value, low, _ in shares]
    high = [max(0.0, 100 * (high - value)) for value, _, high in shares]
    return values, [low, high]


def _length_axis(panel: Axes, cells: Cells) -> None:
    lengths = sorted({chars for _, chars, _ in cells})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [_short(chars) for chars in lengths])
    panel.set_xlim(lengths[0] / 1.6, lengths[-1] * 1.6)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("characters")


def _short(chars: int) -> str:
    for unit, name in ((1_000_000, "m"), (1_000, "k")):
        if chars >= unit and chars % unit == 0:
            return f"{chars // unit}{name}"
    return f"{chars:,}"


def _style(arm: str) -> dict:
    colour, marker, line = _LOOK[arm]
    return {
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "markersize": 4.5,
        "linewidth": 1.3,
        "elinewidth": 0.8,
        "capsize": 2,
    }
