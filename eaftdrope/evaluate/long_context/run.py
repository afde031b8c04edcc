"""Measuring the cells of a plan, one model after the other; each cell is stored before the next begins.

RULER and LongBench run through lm-eval, on the live model with the variant's rotary embedding. lm-eval has the tasks and
downloads their data. A crop is its `max_length`: it keeps the last tokens of a longer prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from eaftdrope.errors import UserError
from eaftdrope.models import load_model, resolve_model

from ..likelihood import Progress
from ..lm_eval import run_tasks
from .attention import needle_attention
from .needles import Needles
from .perplexity import window_losses
from .plan import ContextCell, ContextModel, ContextOptions, ContextPlan
from .results import ContextResults
from .retrieval import find_needles
from .variants import as_variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_plan(
    plan: ContextPlan,
    results: ContextResults,
    *,
    started: Callable[[ContextCell], Progress] | None = None,
) -> None:
    """Measure the cells that `results` does not have yet.

    Args:
        started: called before each cell; returns the function that is called with (done, total).

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
                    f"out of memory at {cell.length:,} tokens ({cell.model}, {cell.variant}, {cell.probe}). Cells measured "
                    f"so far are kept: pass a lower --batch-tokens ({plan.options.batch_tokens:,}) to resume, or shorter "
                    "--lengths to start again."
                ) from error
            results.add(cell, result, time.perf_counter() - start)
        # freed before the next one is loaded: two may not fit
        del model


def measure(
    model: PreTrainedModel,
    planned: ContextModel,
    cell: ContextCell,
    options: ContextOptions,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the result of one cell, as JSON."""
    with as_variant(model, cell.variant, cell.length, planned.trained) as crop:
        if cell.probe in options.suites:
            return run_suite(cell.probe, model, planned, cell.length, crop=crop, options=options)
        if cell.probe == "perplexity":
            windows = planned.hay.windows(cell.length, options.windows)
            assert windows is not None, "a length without windows has no cell"
            prefix, size = len(planned.hay.prefix), options.batch_tokens
            return window_losses(
                model, windows, prefix=prefix, crop=crop, batch_tokens=size, progress=progress
            ).as_json()
        if cell.probe == "attention":
            # Few trials: spread them over as many depths.
            depths = min(options.depths, options.attention_trials)
            needles = Needles("niah", planned.tokenizer, planned.hay, cell.length, depths=depths, seed=options.seed)
            return needle_attention(model, needles, options.attention_trials, progress=progress).as_json()
        needles = Needles(
            cell.probe, planned.tokenizer, planned.hay, cell.length, depths=options.depths, seed=options.seed
        )
        return find_needles(
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
    """Return {"scores": [{task, value, stderr, n}, ...]}: one score per task, its first metric.

    RULER generates its prompts for `length` tokens. LongBench has its own, cut to their last `length` tokens.

    Raises:
        UserError: the suite's data or a package that it needs is not available.
    """
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
            f"`pip install 'lm-eval[hf,{suite}]'`. Cells measured so far are kept; the same command resumes."
        ) from error
    return {"scores": scores_of(found, str(length) if suite == "ruler" else None)}


def scores_of(found: dict[str, Any], metric: str | None) -> list[dict[str, Any]]:
    """Return one score per task of lm-eval's result: the metric of that name, None for the task's first."""
    scores = []
    for task, values in found["results"].items():
        # "metric,filter" -> value; errors are "metric_stderr,filter", the rest is text.
        numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
        names = [name for name in numbers if "_stderr," not in name and metric in (None, name.split(",")[0])]
        if not names:
            continue
        head, filtered = names[0].split(",")
        error = numbers.get(f"{head}_stderr,{filtered}")
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        scores.append({"task": task, "value": float(numbers[names[0]]), "stderr": error, "n": count})
    return scores
