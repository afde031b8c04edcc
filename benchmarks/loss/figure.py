"""Figures of a run: time relative to the floor, and peak memory, one row per method and one column per case.

One figure per dtype with all tensors trained, and one for the first shape in all ways it was measured. Colour marks the
origin of a method, a hatch plain cross-entropy; both are legible without colour vision. A failed method keeps its row with
its status; methods that ran nowhere are listed below the figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .table import place

# Okabe and Ito's palette
_COLOURS = {"ours": "#0072B2", "peer": "#E69F00"}
_FLOOR = "#000000"
_TEXT = 8
_HATCH = "////"
_KEY = ("shape", "rows", "logits", "trains")


def draw(rows: Sequence[dict], about: dict, folder: Path) -> list[Path]:
    """Write PNG and SVG files and return their paths; a group of cases without results has no figure."""
    paths = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        first = of_dtype[0]
        groups = {
            "shapes": [row for row in of_dtype if (row["logits"], row["trains"]) == (first["logits"], "all")],
            "cases": [row for row in of_dtype if row["shape"] == first["shape"]],
        }
        if all(row in groups["shapes"] for row in groups["cases"]):
            del groups["cases"]
        for name, group in groups.items():
            if any(row["status"] == "ok" for row in group):
                paths += _figure(group, about, folder / f"loss_{name}_{dtype}")
    return paths


def _figure(rows: Sequence[dict], about: dict, path: Path) -> list[Path]:
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in _KEY), {})[row["method"]] = row
    measured = [name for name in next(iter(cases.values())) if any(_ran(case[name]) for case in cases.values())]
    absent = [name for name in next(iter(cases.values())) if name not in measured]

    width, height = 3.2 + 3.0 * len(cases), 2.2 + 0.42 * len(measured)
    figure, grid = plt.subplots(
        2, len(cases), figsize=(width, height), sharey=True, squeeze=False, layout="constrained"
    )
    ratios = [row["ratio"] for row in rows if row["status"] == "ok"]
    # one scale for all columns, from just below the floor, with room for the numbers beside the bars
    limits = min(0.8, min(ratios, default=1) * 0.6), max(2.0, max(ratios, default=1) * 2.2)
    for column, case in enumerate(cases.values()):
        shown = [case[name] for name in measured]
        grid[0, column].set_title(_title(shown[0]), fontsize=_TEXT + 1)
        _ratios(grid[0, column], shown, limits)
        _memory(grid[1, column], shown)
    for row in grid:
        row[0].set_yticks(range(len(measured)), measured, fontsize=_TEXT)
        for label, name in zip(row[0].get_yticklabels(), measured, strict=True):
            label.set_fontweight("bold" if _family(rows, name) == "ours" else "normal")
    # shared by all axes
    grid[0, 0].invert_yaxis()
    figure.suptitle(f"Head and loss of one training step, {rows[0]['dtype']}", fontsize=_TEXT + 4, fontweight="bold")
    legend = figure.legend(
        handles=_legend(), loc="outside lower center", ncols=3, fontsize=_TEXT, frameon=False,
        title=_caption(rows, about, absent, int(14 * width)), title_fontsize=_TEXT,
    )  # fmt: skip
    legend.get_title().set_multialignment("center")
    paths = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    for file in paths:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return paths


def _ratios(axes: Axes, rows: Sequence[dict], limits: tuple[float, float]) -> None:
    """Draw bars from the floor: to the right for slower methods, to the left for faster ones."""
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    for position, row in enumerate(rows):
        if row["status"] != "ok":
            _word(axes, position, row, at=1.05)
            continue
        axes.barh(position, row["ratio"] - 1, left=1, **_style(row))
        axes.plot([row["ratio_low"], row["ratio_high"]], [position] * 2, color=_FLOOR, linewidth=1)
        right = max(row["ratio"], row["ratio_high"], 1)
        _number(axes, position, right * 1.04, f"{row['ratio']:.2f}", row)
    axes.axvline(1, color=_FLOOR, linewidth=1)
    ticks = [tick for tick in (2.0**power for power in range(-3, 10)) if limits[0] <= tick <= limits[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=_TEXT - 1)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time / time of the bare matrix products", fontsize=_TEXT)
    _tidy(axes)


def _memory(axes: Axes, rows: Sequence[dict]) -> None:
    sizes = {row["method"]: row["extra_bytes"] / 2**20 for row in rows if row["extra_bytes"] is not None}
    largest = max(sizes.values(), default=1)
    axes.set_xlim(0, largest * 1.28)
    for position, row in enumerate(rows):
        size = sizes.get(row["method"])
        if size is None:
            _word(axes, position, row, at=largest * 0.01)
            continue
        axes.barh(position, size, **_style(row))
        _number(axes, position, size + largest * 0.015, f"{size:,.0f}", row)
    axes.tick_params(axis="x", labelsize=_TEXT - 1)
    axes.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("peak memory beyond the gradients, MiB", fontsize=_TEXT)
    _tidy(axes)


def _style(row: dict) -> dict:
    hatch = _HATCH if row["gate"] == "none" else None
    return {"color": _COLOURS[row["family"]], "hatch": hatch, "edgecolor": "white", "linewidth": 0, "height": 0.72}


def _number(axes: Axes, position: int, at: float, text: str, row: dict) -> None:
    weight = "bold" if row["family"] == "ours" else "normal"
    axes.text(at, position, text, va="center", fontsize=_TEXT - 1, fontweight=weight)


def _word(axes: Axes, position: int, row: dict, at: float) -> None:
    text = row["status"] if row["status"] != "ok" else "not known on this system"
    axes.text(at, position, text, va="center", fontsize=_TEXT - 1, style="italic", color="#555555")


def _tidy(axes: Axes) -> None:
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend() -> list[Patch]:
    return [
        Patch(color=_COLOURS["ours"], label="eaftdrope"),
        Patch(color=_COLOURS["peer"], label="others"),
        Patch(facecolor="#999999", hatch=_HATCH, edgecolor="white", label="plain cross-entropy, no gate"),
    ]


def _title(row: dict) -> str:
    extra = [word for word in (row["logits"] + " logits", row["trains"]) if word not in ("random logits", "all")]
    sizes = f"{row['rows']:,} tokens, {row['hidden_size']:,} x {row['vocabulary']:,}"
    return "\n".join([row["shape"] + (f" ({', '.join(extra)})" if extra else ""), sizes])


def _caption(rows: Sequence[dict], about: dict, absent: Sequence[str], columns: int) -> str:
    lines = [f"{place(about)}; {about['environment']['date'][:10]}"]
    best = {row["backend"] for row in rows if row["backend"] and row["method"] != f"eaftdrope-{row['backend']}"}
    if best:
        lines.append(f"eaftdrope without a backend in its name: {' or '.join(sorted(best))}.")
    if absent:
        lines.append(f"Could not be measured here: {', '.join(absent)}.")
    return "\n".join(textwrap.fill(line, columns) for line in lines)


def _ran(row: dict) -> bool:
    return row["status"] != "skipped"


def _family(rows: Sequence[dict], name: str) -> str:
    return next(row["family"] for row in rows if row["method"] == name)
