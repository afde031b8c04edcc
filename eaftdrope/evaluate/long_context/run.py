"""Measuring the cells of a plan, one model after the other; each cell is stored before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from eaftdrope.errors import UserError
from eaftdrope.models import load_model

from .arms import as_arm
from .attention import needle_attention
from .needles import Needles
from .perplexity import window_losses
from .plan import Cell, Options, Plan, PlannedModel
from .retrieval import ask
from .store import Results


def run_plan(
    plan: Plan,
    results: Results,
    *,
    started: Callable[[Cell], Callable[[int, int], None]] | None = None,
) -> None:
    """Measure what `results` does not have yet.

    Args:
        started: called before a cell; what it returns is called with (done, total) in it.

    Raises:
        UserError: a model cannot be loaded or measured, or the device has too little memory.
    """
    for planned in plan.models:
        left = [cell for cell in results.left() if cell.model == planned.name]
        if not left:
            continue
        model = load_model(planned.reference, dtype=plan.options.dtype).to(plan.options.device).eval()
        for cell in left:
            progress = None if started is None else started(cell)
            start = time.perf_counter()
            try:
                result = measure(model, planned, cell, plan.options, progress)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of memory at {cell.length:,} tokens ({cell.model}, {cell.arm}, {cell.probe}). What was measured "
                    f"is kept: lower --batch-tokens ({plan.options.batch_tokens:,}) goes on, shorter --lengths begin anew."
                ) from error
            results.add(cell, result, time.perf_counter() - start)
        # Before the next one is loaded: two may not fit.
        del model


def measure(model, planned: PlannedModel, cell: Cell, options: Options, progress=None) -> dict:
    """The result of one cell, as JSON."""
    with as_arm(model, cell.arm, cell.length, planned.trained) as crop:
        if cell.probe in options.suites:
            from .suites import run_suite

            return run_suite(cell.probe, model, planned, cell.length, crop=crop, options=options)
        if cell.probe == "perplexity":
            windows = planned.hay.windows(cell.length, options.windows)
            begin = len(planned.hay.begin)
            size = options.batch_tokens
            return window_losses(model, windows, begin=begin, crop=crop, batch_tokens=size, progress=progress).as_json()
        if cell.probe == "attention":
            # Few trials: spread them over as many depths.
            depths = min(options.depths, options.attention_trials)
            needles = Needles("niah", planned.tokenizer, planned.hay, cell.length, depths=depths, seed=options.seed)
            return needle_attention(model, needles, options.attention_trials, progress=progress).as_json()
        needles = Needles(
            cell.probe, planned.tokenizer, planned.hay, cell.length, depths=options.depths, seed=options.seed
        )
        return ask(
            model,
            planned.tokenizer,
            needles,
            options.trials,
            crop=crop,
            batch_tokens=options.batch_tokens,
            progress=progress,
        ).as_json()
