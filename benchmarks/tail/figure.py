"""Figures of both benchmarks: errors against FLOPs, and held-out loss along training."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import matplotlib

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .curves import by_seed

# Okabe and Ito's palette; markers and dashes repeat the distinction
_EXACT, _SPARSE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
_MARKERS = "osD^v<>P"
_TEXT = 8


def draw_curves(result: dict, path: Path) -> None:
    """Draw one row per gate: held-out loss, sparse minus exact with the spread over seeds, and the columns kept."""
    gates = list(result["verdict"])
    figure, grid = plt.subplots(
        len(gates), 3, figsize=(13, 3.6 * len(gates) + 0.6), squeeze=False, layout="constrained"
    )  # fmt: skip
    for (losses, differences, kept), gate in zip(grid, gates, strict=True):
        exact, sparse = (by_seed(result["runs"], gate, arm) for arm in ("exact", "sparse"))
        _losses(losses, exact, sparse, gate)
        _differences(differences, exact, sparse, result["verdict"][gate])
        for run in result["runs"]:
            if (run["gate"], run["arm"]) == (gate, "sparse"):
                shares = [float("nan") if share is None else 100 * share for share in run["kept_share"]]
                kept.plot(range(1, len(shares) + 1), shares, color=_SPARSE, alpha=0.75, linewidth=1)
        kept.set_ylim(bottom=0)
        _label(kept, "columns of the vocabulary kept (one line per seed)", "% of columns")
    settings, where = result["settings"], result["environment"]
    about = (
        f"{settings['model'].removeprefix('package:')}, all weights, {settings['data']}, batch {settings['batch_size']}, "
        f"{settings['steps']} steps, rate {settings['learning_rate']:g}; held out: {settings['held_out']}, "
        f"{result['held_out_tokens']:,} tokens. {where['processor']}, {where['date'][:10]}."
    )
    figure.suptitle("Training with exact and with tail-sparse gradients", fontsize=_TEXT + 4, fontweight="bold")
    figure.supxlabel(textwrap.fill(about, 170), fontsize=_TEXT)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _losses(axes: Axes, exact: dict, sparse: dict, gate: str) -> None:
    for seed, curve in exact.items():
        label = ("exact", "sparse") if seed == min(exact) else (None, None)
        axes.plot(*zip(*curve), color=_EXACT, linewidth=2.5, alpha=0.45, label=label[0])
        axes.plot(*zip(*sparse[seed]), color=_SPARSE, linewidth=1, linestyle="--", label=label[1])
    axes.legend(fontsize=_TEXT, frameon=False)
    _label(axes, f"gate {gate}: held-out cross-entropy (one line per seed)", "nats per token")


def _differences(axes: Axes, exact: dict, sparse: dict, verdict: dict) -> None:
    spread = 1e3 * verdict["spread_over_seeds"]
    axes.axhspan(
        -spread, spread, color=_EXACT, alpha=0.15, linewidth=0, label="± spread over seeds of exact, at the end"
    )
    axes.axhline(0, color=_GREY, linewidth=0.8)
    for index, (seed, curve) in enumerate(exact.items()):
        steps = [step for step, _ in curve]
        apart = [1e3 * (theirs - ours) for (_, ours), (_, theirs) in zip(curve, sparse[seed], strict=True)]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(steps, apart, color=_SPARSE, linewidth=1, marker=marker, markersize=4, label=f"seed {seed}")
    axes.legend(fontsize=_TEXT - 1, frameon=False)
    word = "safe by the rule" if verdict["safe"] else "NOT safe by the rule"
    _label(axes, f"sparse - exact: {word}", "1e-3 nats per token")


def draw_errors(result: dict, path: Path) -> None:
    """Draw one column per source and one row per gate: errors over FLOPs by threshold, at the operator's group height."""
    from eaftdrope.loss.tail import GROUP_ROWS

    parts = result["results"]
    sources, gates = (list(dict.fromkeys(part[name] for part in parts)) for name in ("data", "gate"))
    figure, grid = plt.subplots(
        len(gates), len(sources), figsize=(max(9, 4.4 * len(sources)), 3.3 * len(gates) + 0.9),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    lines = [
        ("hidden_error_no_tail", "dX without the rank-1 term", _GREY, "^", ":"),
        ("hidden_error", "dX", _SPARSE, "s", "--"),
        ("weight_error", "dW", _EXACT, "o", "-"),
        ("weight_error_rank1", "dW with a rank-1 term too", _GREEN, "v", "-."),
    ]
    for part in parts:
        axes = grid[gates.index(part["gate"]), sources.index(part["data"])]
        chosen = [row for row in part["grid"] if (row["rows"], row["order"]) == (GROUP_ROWS, "as they come")]
        for name, label, colour, marker, dashes in lines:
            x, y = [row["flops"] for row in chosen], [row[name] for row in chosen]
            axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1, label=label)
        rounding = next(row for row in part["operator"] if (row["dtype"], row["tail"]) == ("bfloat16", "exact"))
        axes.axhline(
            rounding["weight_error"], color="#000000", linewidth=0.8, label="dW, exact in bfloat16 (rounding only)"
        )
        for row in chosen:
            # each threshold is labelled once, above its highest point
            axes.annotate(
                f"$2^{{{math.log2(row['threshold']):.0f}}}$", (row["flops"], row["hidden_error_no_tail"]),
                textcoords="offset points", xytext=(0, 6), ha="center", fontsize=_TEXT - 1,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.margins(x=0.12, y=0.12)
        axes.xaxis.set_major_locator(plt.MaxNLocator(5))
        _label(axes, f"{part['data']}, gate {part['gate']}", "relative error", "FLOPs relative to three dense products")
    settings, where = result["settings"], result["environment"]
    figure.suptitle(
        f"Gradients of a tail-sparse backward, by threshold (groups of {GROUP_ROWS} rows)",
        fontsize=_TEXT + 4, fontweight="bold",
    )  # fmt: skip
    handles, labels = grid[0, 0].get_legend_handles_labels()
    about = (
        f"{result['model'].removeprefix('package:')}, {settings['tokens']:,} trained tokens per source, relative to "
        f"float64; {where['date'][:10]}"
    )
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=_TEXT, frameon=False,
        title=about, title_fontsize=_TEXT,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(axes: Axes, title: str, y: str, x: str = "step") -> None:
    axes.set_title(title, fontsize=_TEXT + 1)
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT - 1)
    if x == "step":
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
