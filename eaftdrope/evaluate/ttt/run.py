"""Measuring the cells of a plan, one set of weights after the other; each cell is stored before the next begins."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from eaftdrope.errors import UserError
from eaftdrope.ttt import TTTConfig

from ..likelihood import Progress
from .arms import ARMS, WEIGHTS, as_reader, passage_losses
from .latency import step_costs
from .needle import ask_pass_key
from .plan import TTTEvalCell, TTTEvalPlan
from .positions import bin_sums
from .results import TTTEvalResults
from .retention import retention_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_plan(
    plan: TTTEvalPlan,
    results: TTTEvalResults,
    *,
    started: Callable[[TTTEvalCell], Progress] | None = None,
) -> None:
    """Measure the cells that `results` does not have yet.

    Args:
        started: called before each cell; returns the function that is called with (done, total).

    Raises:
        UserError: a model cannot be loaded or measured, or the device has too little memory.
    """
    for weights in WEIGHTS:
        left = [cell for cell in results.left() if weights_of(cell) == weights]
        if not left:
            continue
        model = plan.models.load(weights, plan.options.dtype, plan.options.device)
        # a rate is set up once for all of its cells
        for (arm, rate), cells in groupby(left, key=lambda cell: (cell.arm, cell.at if cell.probe == "fit" else "")):
            try:
                _measure_group(plan, results, model, arm, rate, list(cells), started)
            except torch.OutOfMemoryError as error:
                where = f"{plan.models.subjects[weights].reference}, {arm or 'latency'}"
                raise UserError(
                    f"out of memory ({where}). Cells measured so far are kept, and the same command resumes where more "
                    "memory is free. To need less, pass a lower --length or lower --positions, and another --output."
                ) from error
        # freed before the next one is loaded: two may not fit
        del model


def weights_of(cell: TTTEvalCell) -> str:
    """Return the weights that a cell is measured on; latency depends on shapes only."""
    return ARMS[cell.arm].weights if cell.arm else "base"


def _measure_group(
    plan: TTTEvalPlan,
    results: TTTEvalResults,
    model: PreTrainedModel,
    name: str,
    rate: str,
    cells: list[TTTEvalCell],
    started: Callable[[TTTEvalCell], Progress] | None,
) -> None:
    """Measure cells of one arm at one rate (those of the latency, if `name` is "")."""

    def timed(cell: TTTEvalCell, measure: Callable[[Progress | None], Any]) -> None:
        progress = None if started is None else started(cell)
        start = time.perf_counter()
        results.add(cell, measure(progress), time.perf_counter() - start)

    if not name:
        for cell in cells:
            timed(cell, lambda progress, cell=cell: measure_latency(model, plan, int(cell.at), progress))
        return
    arm, lr = ARMS[name], None
    if arm.learning == "fitted":
        fit = results.fit(name)
        lr = float(rate) if rate else fit.best if fit is not None else plan.options.rates[0]
    with as_reader(model, arm, plan.models.config_of(arm.weights), lr) as reader:
        for cell in cells:
            timed(cell, lambda progress, cell=cell: measure(reader, plan, cell, progress))


def measure(reader: PreTrainedModel, plan: TTTEvalPlan, cell: TTTEvalCell, progress: Progress | None = None) -> Any:
    """Return the result of one cell of an arm, as JSON."""
    if cell.probe == "loss":
        return bin_sums(passage_losses(reader, plan.passages.test[cell.index].ids), plan.edges)
    if cell.probe == "fit":
        return passage_losses(reader, plan.passages.fit[cell.index].ids).mean().item()
    if cell.probe == "needle":
        assert plan.keys is not None
        return ask_pass_key(reader, plan.keys.trial(cell.at, cell.index))
    options = plan.options
    scores = retention_scores(
        reader,
        plan.tokenizer,
        plan.read.ids if cell.at == "read" else None,
        questions=options.questions,
        tokens=options.probe_tokens,
        progress=progress,
    )
    return [asdict(score) for score in scores]


def measure_latency(
    model: PreTrainedModel, plan: TTTEvalPlan, position: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Return the costs at one position by reader, as JSON."""
    config = plan.models.config_of("base")
    if not config.lr:
        config = dataclasses.replace(config, lr=TTTConfig.lr)
    costs = step_costs(
        model, config, plan.models.window, position, full=plan.models.stock_windows["base"] is None, progress=progress
    )
    return {name: asdict(cost) for name, cost in costs.items()}
