"""Measuring the cells of a plan: trials in lockstep, a few at a time, each group stored before the next begins."""

from __future__ import annotations

from collections.abc import Callable

from eaftdrope.rlm import RLM
from eaftdrope.rlm.models import Model, ScriptedModel
from eaftdrope.rlm.protocol import SYSTEM, SYSTEM_SHORT
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.entries import classifier

from ..likelihood import Progress
from .chat_models import open_models
from .plan import BenchCell, BenchOptions, BenchPlan
from .results import BenchResults, journal_label
from .trials import CEILING, FLOOR, run_trials

# trials that share batches, and that a kill can lose (of the arm rlm: up to their journals)
_GROUP = 10


def run_plan(
    plan: BenchPlan,
    results: BenchResults,
    *,
    started: Callable[[BenchCell], Progress] | None = None,
    models: tuple[Model, Model] | None = None,
) -> None:
    """Measure the trials that `results` does not have yet.

    Args:
        started: called before each cell; returns the function that is called with (done, total).
        models: root and sub-model, instead of those of the options.

    Raises:
        UserError: a model cannot be loaded.
    """
    left = [cell for cell in plan.cells if len(results.trials(cell)) < cell.trials]
    if not left:
        return
    rlm = _rlm(plan.options, models or _models(plan.options, left))
    for cell in left:
        progress = None if started is None else started(cell)
        while (done := len(results.trials(cell))) < cell.trials:
            if progress is not None:
                progress(done, cell.trials)
            seeds = range(done, min(done + _GROUP, cell.trials))
            sets = {"names": plan.options.names, "phrasings": plan.options.phrasings}
            tasks = [(seed, make_task(cell.task, seed, cell.chars, **sets)) for seed in seeds]
            found = run_trials(cell.arm, tasks, rlm, journals=results.journals, label=journal_label(cell))
            results.add(cell, found)


def _rlm(options: BenchOptions, models: tuple[Model, Model]) -> RLM:
    root, sub_model = models
    if options.classifier_errors is not None:
        sub_model = classifier(options.classifier_errors)
    return RLM(root, sub_model, limits=options.limits, system=SYSTEM_SHORT if options.short_prompt else SYSTEM)


def _models(options: BenchOptions, cells: list[BenchCell]) -> tuple[Model, Model]:
    if all(cell.arm in (FLOOR, CEILING) for cell in cells):
        # these call no model
        unused = ScriptedModel([])
        return unused, unused
    return open_models(
        options.model,
        options.sub_model,
        endpoint=options.endpoint,
        window=options.window,
        device=options.device,
        dtype=options.dtype,
    )
