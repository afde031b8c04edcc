"""SmolLM2 before and after its training as a root: one table and one figure of what `eaftdrope rlm bench` measured.

    python -m benchmarks.rlm bench

Reads every results/bench/NAME-*.json, the rlm_bench.json of a measurement; NAME is the model's, "base" or "root".
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

# no display is needed
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from eaftdrope.evaluate.long_context.retrieval import wilson

HERE = Path(__file__).resolve().parent / "results"
FOLDER, FIGURE = HERE / "bench", HERE / "bench.png"
# model and arm -> name, and colour of Okabe and Ito
ARMS = {
    ("root", "rlm"): ("RLM, trained root", "#D55E00"),
    ("base", "rlm"): ("RLM, untrained", "#E69F00"),
    ("base", "plain"): ("plain call", "#0072B2"),
    ("base", "bm25"): ("BM25, one call", "#56B4E9"),
    ("base", "map-reduce"): ("map-reduce", "#F0E442"),
    ("base", "summary"): ("rolling summary", "#882255"),
    ("root", "plain"): ("plain call to the root", "#CC79A7"),
    ("root", "bm25"): ("BM25, one call to the root", "#999999"),
    ("base", "guess"): ("guess", "#000000"),
    ("base", "oracle"): ("oracle", "#009E73"),
}
_TEXT = 8


@dataclass(frozen=True)
class BenchCell:
    """Trials of an arm; `seconds` are those of its models, by trial."""

    task: str
    chars: int
    arm: tuple[str, str]
    scores: list[float]
    tokens: list[int]
    seconds: list[float]

    @property
    def right(self) -> tuple[float, float, float]:
        """The share of right answers with its 95 % Wilson interval."""
        hits = sum(score == 1 for score in self.scores)
        return (hits / len(self.scores), *wilson(hits, len(self.scores)))


def read_cells(folder: Path) -> list[BenchCell]:
    found = []
    for file in sorted(folder.glob("*.json")):
        model = file.stem.partition("-")[0]
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            trials, arm = cell["trials"], (model, cell["arm"])
            if not trials or arm not in ARMS:
                continue
            columns = ([trial[key] for trial in trials] for key in ("score", "tokens", "seconds"))
            found.append(BenchCell(cell["task"], cell["chars"], arm, *columns))
    return found


def table(cells: list[BenchCell]) -> str:
    """Mean scores, shares of right answers with their intervals, medians of tokens and seconds, as Markdown."""
    lines = ["| task | characters | arm | n | score | right | tokens | seconds |", "|---|---|---|---|---|---|---|---|"]
    for cell in sorted(cells, key=lambda one: (one.task != "needle", one.chars, list(ARMS).index(one.arm))):
        share, low, high = (round(100 * value) for value in cell.right)
        mean = statistics.mean(cell.scores)
        tokens, seconds = statistics.median(cell.tokens), statistics.median(cell.seconds)
        cost = f"{tokens:,.0f} | {seconds:.1f}" if cell.arm[1] not in ("guess", "oracle") else "– | –"
        lines.append(
            f"| {cell.task} | {cell.chars:,} | {ARMS[cell.arm][0]} | {len(cell.scores)} | {mean:.2f} | "
            f"{share} % ({low}–{high}) | {cost} |"
        )
    return "\n".join(lines)


def draw(cells: list[BenchCell], path: Path) -> Path:
    """Write the figure: shares of right answers by length, one panel per task."""
    tasks = sorted({cell.task for cell in cells}, reverse=True)
    figure, panels = plt.subplots(1, len(tasks), figsize=(12, 4), layout="constrained", sharey=True, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        _panel(axes, [cell for cell in cells if cell.task == task])
        axes.set_title(task, fontsize=_TEXT + 1)
    panels[0][0].set_ylabel("% right, with 95 % Wilson intervals", fontsize=_TEXT)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=_TEXT, frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct before and after training as a root", fontsize=_TEXT + 4, fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _panel(axes: Axes, cells: list[BenchCell]) -> None:
    for number, (arm, (name, colour)) in enumerate(ARMS.items()):
        own = sorted((cell for cell in cells if cell.arm == arm), key=lambda cell: cell.chars)
        if not own:
            continue
        # apart from each other, where intervals would hide one another
        x = [cell.chars * 1.04 ** (number - len(ARMS) / 2) for cell in own]
        shares = [[100 * value for value in cell.right] for cell in own]
        errors = [[share - low for share, low, _ in shares], [high - share for share, _, high in shares]]
        y = [share for share, *_ in shares]
        axes.errorbar(x, y, errors, color=colour, marker="o", markersize=4, linewidth=1, capsize=2, label=name)
    lengths = sorted({cell.chars for cell in cells})
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{chars:,}" for chars in lengths])
    axes.minorticks_off()
    axes.tick_params(labelsize=_TEXT)
    axes.set_xlabel("characters", fontsize=_TEXT)
    axes.set_ylim(-3, 103)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def bench(
    results: Annotated[Path, typer.Option(help="Folder with the measurements.")] = FOLDER,
    figure: Annotated[Path, typer.Option(help="Where the figure goes.")] = FIGURE,
) -> None:
    """Print the table and draw the figure of what was measured."""
    cells = read_cells(results)
    typer.echo(table(cells))
    typer.echo(f"written  {draw(cells, figure)}")
