"""The tables of `eaftdrope rlm bench`, for the terminal and for the page, and the crossover length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..long_context.retrieval import wilson
from ..table import TextTable
from .trials import ARMS, CEILING, FLOOR, STEPS, TaskTrial

CAPTION = (
    "Mean score; share right in % with its 95 % Wilson interval; n where it differs. guess: without reading. "
    "oracle: a scripted root and sub-model, the ceiling of the harness."
)
_TITLES = {"plain": "a plain call", "bm25": "BM25"}
COSTS = ("tokens", "calls", "seconds")
_CAUTION = "It compares means over the tasks of a length; the intervals of the table show how certain each is."

Cells = dict[tuple[str, int, str], list[TaskTrial]]


def cells_of(document: dict[str, Any]) -> Cells:
    """The trials of a document of `BenchResults`, by task, length and arm."""
    return {
        (cell["task"], cell["chars"], cell["arm"]): [TaskTrial(**trial) for trial in cell["trials"]]
        for cell in document["cells"]
    }


def mean_score(trials: Sequence[TaskTrial]) -> float:
    return sum(trial.score for trial in trials) / len(trials)


def share(trials: Sequence[TaskTrial], step: str) -> tuple[float, float, float]:
    """The share of trials that came to a step of `STEPS`, with its 95 % Wilson interval."""
    hits = sum(bool(getattr(trial, step)) for trial in trials)
    return hits / len(trials), *wilson(hits, len(trials))


def percentile(values: Sequence[float], q: float) -> float:
    """The value that a share `q` of the values does not exceed (nearest rank)."""
    # ceil(q n), counted from 1
    return sorted(values)[max(0, -int(-q * len(values) // 1) - 1)]


def crossover(cells: Cells, arm: str = "plain") -> tuple[int | None, int | None] | None:
    """Between which two measured lengths the mean score of the RLM passes that of another arm.

    Returns:
        (last length at which it is not above, first length from which on it is); the first is None if it is above at all
        lengths, the second if it is not above at the longest. None if the arms share no length.
    """
    lengths = sorted({chars for _, chars, name in cells if name == "rlm"} & {c for _, c, name in cells if name == arm})
    if not lengths:
        return None
    above = None
    for chars in reversed(lengths):
        tasks = [task for task, c, name in cells if c == chars and name == "rlm" and (task, chars, arm) in cells]
        rlm, other = (
            sum(mean_score(cells[task, chars, name]) for task in tasks) / max(1, len(tasks)) for name in ("rlm", arm)
        )
        if not tasks or rlm <= other:
            return chars, above
        above = chars
    return None, above


def crossover_text(cells: Cells, arm: str = "plain") -> str | None:
    """The crossover in a sentence."""
    found = crossover(cells, arm)
    if found is None:
        return None
    below, above = found
    other = _TITLES.get(arm, arm)
    if below is None:
        return f"The RLM's mean score is above that of {other} at every measured length."
    if above is None:
        return f"The RLM's mean score is not above that of {other} at {below:,} characters, the longest measured."
    return f"From between {below:,} and {above:,} characters on, the RLM's mean score is above that of {other}."


def tables_of(document: dict[str, Any]) -> list[TextTable]:
    """The tables of a document: scores, how far roots came, costs; without those of which nothing was measured."""
    cells = cells_of(document)
    return [table for table in (score_table(cells), step_table(cells), cost_table(cells)) if table.lines]


def crossover_sentences(cells: Cells) -> str:
    """From which length on the RLM is above a plain call, and above retrieval; "" if neither was measured beside it."""
    found = [text for arm in ("plain", "bm25") if (text := crossover_text(cells, arm))]
    return " ".join([*found, _CAUTION] if found else [])


def score_table(cells: Cells) -> TextTable:
    """Scores: one line per task and length, one column per arm."""
    arms = [arm for arm in ARMS if any(name == arm for *_, name in cells)]
    lines = []
    for task, chars in _places(cells):
        counts = [len(cells[task, chars, arm]) for arm in arms if (task, chars, arm) in cells]
        shown = [_score_text(cells.get((task, chars, arm)), counts[0]) for arm in arms]
        lines.append([task, f"{chars:,}", str(counts[0]), *shown])
    return TextTable("Scores", ["task", "characters", "n", *arms], lines, CAPTION)


def _score_text(trials: list[TaskTrial] | None, usual: int) -> str:
    if not trials:
        return "–"
    right, low, high = share(trials, "right")
    count = "" if len(trials) == usual else f", n {len(trials)}"
    return f"{mean_score(trials):.2f} · {100 * right:.0f} ({100 * low:.0f}–{100 * high:.0f}{count})"


def step_table(cells: Cells) -> TextTable:
    """How far the root came: shares with their intervals; no lines without the arm rlm."""
    lines = []
    for task, chars in _places(cells):
        trials = cells.get((task, chars, "rlm"))
        if trials:
            shares = [share(trials, step) for step in STEPS]
            shown = [f"{100 * value:.0f} ({100 * low:.0f}–{100 * high:.0f})" for value, low, high in shares]
            lines.append([task, f"{chars:,}", str(len(trials)), *shown])
    note = (
        "Shares in % with 95 % Wilson intervals. fence: the root wrote a block of code; ran: one ran without an error; "
        "finished: it set an answer."
    )
    return TextTable("How far the root came", ["task", "characters", "n", *STEPS], lines, note)


def cost_table(cells: Cells) -> TextTable:
    """Costs of a trial, median and 95th percentile."""
    lines = [
        [task, arm, f"{chars:,}", *(_cost_text(cells[task, chars, arm], cost) for cost in COSTS)]
        for task, chars in _places(cells)
        for arm in ARMS
        if arm not in (FLOOR, CEILING) and (task, chars, arm) in cells
    ]
    note = "Seconds are those of the models. The median of an RLM is low; its tail is not."
    return TextTable(
        "Cost per trial: median / 95th percentile", ["task", "arm", "characters", *COSTS], lines, note, names=2
    )


def _cost_text(trials: list[TaskTrial], cost: str) -> str:
    median, tail = (percentile([getattr(trial, cost) for trial in trials], q) for q in (0.5, 0.95))
    form = "{:,.1f} / {:,.1f}" if cost == "seconds" else "{:,} / {:,}"
    return form.format(median, tail)


def _places(cells: Cells) -> list[tuple[str, int]]:
    return list(dict.fromkeys((task, chars) for task, chars, _ in cells))
