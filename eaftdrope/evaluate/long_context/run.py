"""Measuring the cells of a plan, one model after the other; each cell is stored before the next begins.

RULER and LongBench through lm-eval, on the live model with whatever rotary embedding it has at the moment.

lm-eval brings the tasks and downloads their data. A crop is its own `max_length`: it keeps the
last tokens of a longer prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from eaftdrope.errors import UserError
from eaftdrope.models import load_model, resolve_model

from .attention import needle_attention
from .needles import Needles
from .perplexity import window_losses
from .plan import ContextCell, ContextModel, ContextOptions, ContextPlan
from .results import ContextResults
from .retrieval import ask
from .variants import as_variant


def run_plan(
    plan: ContextPlan,
    results: ContextResults,
    *,
    started: Callable[[ContextCell], Callable[[int, int], None]] | None = None,
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


def measure(model, planned: ContextModel, cell: ContextCell, options: ContextOptions, progress=None) -> dict:
    """The result of one cell, as JSON."""
    with as_variant(model, cell.arm, cell.length, planned.trained) as crop:
        if cell.probe in options.suites:
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


def run_suite(
    suite: str, model, planned: ContextModel, length: int, *, crop: int | None, options: ContextOptions
) -> dict:
    """{"scores": [{task, value, stderr, n}, ...]}: one score a task, its first metric.

    RULER makes its prompts for `length` tokens. LongBench has its own, cut to `length` in front.

    Raises:
        UserError: lm-eval cannot get the suite's data or a package that it needs.
    """
    from ..lm_eval import run_tasks

    longest = length if crop is None else min(crop, length)
    # RULER counts its prompts' tokens with a tokenizer that it loads itself.
    metadata = {"tokenizer": resolve_model(planned.reference).path, "max_seq_lengths": [length]}
    try:
        found = run_tasks(
            model,
            planned.tokenizer,
            [suite],
            batch_size=1,
            limit=options.trials,
            max_length=longest,
            metadata=metadata,
            samples=False,
        )
    except (OSError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--suite {suite}: lm-eval cannot measure it: {reason} It downloads the suite's data, and needs "
            f"`pip install 'lm-eval[hf,{suite}]'`. What was measured so far is kept; the same command goes on."
        ) from error
    return {"scores": scores_of(found, str(length) if suite == "ruler" else None)}


def scores_of(found: dict, metric: str | None) -> list[dict]:
    """One score a task of lm-eval's result: the metric of that name, None for the task's first."""
    scores = []
    for task, values in found["results"].items():
        # "metric,filter" -> value; errors are "metric_stderr,filter", the rest is words.
        numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
        names = [name for name in numbers if "_stderr," not in name and metric in (None, name.split(",")[0])]
        if not names:
            continue
        head, filtered = names[0].split(",")
        error = numbers.get(f"{head}_stderr,{filtered}")
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        scores.append({"task": task, "value": float(numbers[names[0]]), "stderr": error, "n": count})
    return scores
