"""The probe `rlm_tasks` in the report of a training run: how far roots came before and after, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from eaftdrope.evaluate.long_context.retrieval import wilson
from eaftdrope.evaluate.scores import Score

from ..blocks import Gallery, PageSection, TableBlock, Text
from ..figures.rlm_bench import Shares, steps_before_and_after
from ..render import FigureWriter

PROBE = "rlm_tasks"
_WORDS = (
    "Trials of the model as the root of a recursive language model, split by how far they came: a root learns to write a "
    "block of code and to finish before it learns to look into the context, so only the last step is success."
)
_NOTE = "Shares in % of the trials, each with its 95 % Wilson interval."


def rlm_tasks_section(before: Sequence[Score], after: Sequence[Score], writer: FigureWriter) -> list[PageSection]:
    """The section of a run that has the probe, else none."""
    sides = [_by_task(scores) for scores in (before, after)]
    tasks = list(dict.fromkeys(task for side in sides for task in side))
    if not tasks:
        return []
    pairs = {task: (sides[0].get(task, {}), sides[1].get(task, {})) for task in tasks}
    rows: list[Sequence[str]] = []
    for task, (old, new) in pairs.items():
        rows.append([task])
        rows += [[step, _text(old.get(step)), _text(new.get(step))] for step in dict.fromkeys([*old, *new])]
    trials = next(score.n for score in [*before, *after] if score.probe == PROBE)
    table = TableBlock(
        f"{trials:,} trials per task",
        ("step", "before", "after"),
        rows,
        numeric=(1, 2),
        note=_NOTE,
    )
    label = "Share of the trials that reached each step, before and after training, with 95 % Wilson intervals."
    picture = writer.picture("rlm_tasks", steps_before_and_after(pairs), label, wide=len(tasks) > 1)
    return [PageSection("rlm-tasks", "As the root of an RLM", [Text(_WORDS), table, Gallery([picture])])]


def _by_task(scores: Sequence[Score]) -> dict[str, Shares]:
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for score in scores:
        if score.probe == PROBE:
            # "needle: wrote a block", as the probe names its metrics
            task, _, step = score.metric.partition(": ")
            found.setdefault(task, {})[step] = (score.value, *wilson(round(score.value * score.n), score.n))
    return dict(found)


def _text(share: tuple[float, float, float] | None) -> str:
    if share is None:
        return "–"
    value, low, high = (100 * one for one in share)
    return f"{value:.0f} ({low:.0f}–{high:.0f})"
