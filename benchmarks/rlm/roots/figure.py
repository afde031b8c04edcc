"""The figure: shares of trials that wrote a block, ran, finished and were right, per arm, task and set of phrasings."""

from __future__ import annotations

from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from eaftdrope.evaluate.rlm.trials import STEPS

from . import plan
from .plan import RootCell
from .results import RootResults
from .table import NAMES, models, shares, trials_of

_TEXT = 8
# Okabe and Ito's colours
_COLOURS = {"untrained": "#999999", "cross-entropy": "#0072B2", "EAFT": "#D55E00", "EAFT, exempt": "#009E73"}


def draw(results: RootResults, path: Path) -> Path:
    """Write the figure; points are single trainings, bars the shares over all with 95 % Wilson intervals."""
    measured = [p for p in plan.PHRASINGS if any(trials_of(results, arm, t, p) for arm in _COLOURS for t in plan.TASKS)]
    size = (12, 3.3 * len(measured))
    figure, panels = plt.subplots(len(measured), 2, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for row, phrasings in zip(panels, measured, strict=True):
        for axes, task in zip(row, plan.TASKS, strict=True):
            _panel(axes, results, task, phrasings)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=_TEXT, frameon=False
    )
    settings = results.content["settings"]
    figure.suptitle(
        f"SmolLM2-135M as a root after {settings['rows']} rows, contexts of {settings['chars']:,} characters",
        fontsize=_TEXT + 4,
        fontweight="bold",
    )
    figure.supxlabel("bars: all seeds, with 95 % Wilson intervals; points: seeds", fontsize=_TEXT)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _panel(axes: Axes, results: RootResults, task: str, phrasings: str) -> None:
    width = 0.8 / len(_COLOURS)
    for number, (arm, colour) in enumerate(_COLOURS.items()):
        trials = trials_of(results, arm, task, phrasings)
        if not trials:
            continue
        for place, step in enumerate(STEPS):
            x = place + (number - 1.5) * width
            share, low, high = shares(trials, step)
            label = arm if place == 0 else None
            axes.bar(x, share, width, color=colour, alpha=0.75, label=label)
            axes.errorbar(x, share, [[share - low], [high - share]], color="#333333", linewidth=0.8)
            cells = [RootCell(training, task, phrasings) for training in models(arm)]
            seeds = [shares(results.trials(cell), step)[0] for cell in cells if results.done(cell)]
            if len(seeds) > 1:
                axes.plot([x] * len(seeds), seeds, ".", color="#000000", markersize=3)
    axes.set_xticks(range(len(STEPS)), [NAMES[step] for step in STEPS], fontsize=_TEXT)
    axes.tick_params(axis="y", labelsize=_TEXT)
    shown = {"train": "trained phrasings", "test": "unseen phrasings"}[phrasings]
    axes.set_title(f"{task}, {shown}", fontsize=_TEXT + 1)
    axes.set_ylabel("% of trials", fontsize=_TEXT)
    axes.set_ylim(0, 105)
