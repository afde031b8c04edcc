"""RULER and LongBench through lm-eval, on the live model with whatever rotary embedding it has at the moment.

lm-eval brings the tasks and downloads their data. A crop is its own `max_length`: it keeps the
last tokens of a longer prompt.
"""

from __future__ import annotations

from eaftdrope.errors import UserError
from eaftdrope.models import resolve_model

from .plan import Options, PlannedModel


def run_suite(suite: str, model, planned: PlannedModel, length: int, *, crop: int | None, options: Options) -> dict:
    """{"scores": [{task, value, stderr, n}, ...]}: one score a task, its first metric.

    RULER makes its prompts for `length` tokens. LongBench has its own, cut to `length` in front.

    Raises:
        UserError: lm-eval cannot get the suite's data or a package that it needs.
    """
    from eaftdrope.evaluate.harness import run_tasks

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
