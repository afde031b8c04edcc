"""Train and measure what is missing, for a limited time; a later call resumes where this one stopped."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console

from eaftdrope.evaluate.rlm.chat_models import open_chat_model
from eaftdrope.evaluate.rlm.trials import run_trials
from eaftdrope.recipe import Recipe, load_recipe
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import HFModel
from eaftdrope.rlm.protocol import SYSTEM_SHORT
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.entries import classifier
from eaftdrope.run.train import run_recipe

from . import plan
from .plan import RootCell, TrainedRoot
from .results import RootResults

Report = Callable[[str], None]


def run(file: Path, work: Path, minutes: float, report: Report) -> bool:
    """Run what is missing for about `minutes`; return whether nothing is.

    Args:
        file: the results.
        work: folder of the trained adapters.

    Raises:
        UserError: `file` has results of other settings.
    """
    deadline = time.monotonic() + 60 * minutes
    results = RootResults(file, settings())
    for training, cells in plan.steps():
        left = [cell for cell in cells if not results.done(cell)]
        if not left:
            continue
        if time.monotonic() >= deadline:
            report(f"next: {left[0].key}")
            return False
        reference = plan.MODEL if training is None else str(train(training, work, results, report))
        if not measure(left, reference, results, deadline, report):
            return False
    return True


def settings() -> dict[str, Any]:
    """What determines the results."""
    sizes = {"rows": plan.ROWS, "chars": plan.CHARS, "trials": plan.TRIALS, "seeds": list(plan.SEEDS)}
    limits = {"iterations": plan.ITERATIONS, "new_tokens": plan.NEW_TOKENS, "dtype": plan.DTYPE}
    return {"model": plan.MODEL, **sizes, **limits, "losses": plan.LOSSES}


def recipe_of(
    training: TrainedRoot, folder: Path, *, source: str = "package:rlm_expert", rows: int = plan.ROWS
) -> Recipe:
    overrides = {
        "data": {
            "train": {"path": source, "limit": rows},
            "format": "messages",
            "max_length": 1024,
        },
        "model.dtype": plan.DTYPE,
        "loss": plan.LOSSES[training.arm],
        "train.seed": training.seed,
        "train.save_every": plan.SAVE_EVERY,
        "probes": {"target": [], "general": []},
        "output.dir": str(folder),
    }
    # JSON is YAML
    return load_recipe(plan.RECIPE, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


def train(training: TrainedRoot, work: Path, results: RootResults, report: Report) -> Path:
    """Train an arm, or resume its training, unless its folder has the finished run; return the folder."""
    folder = work / training.folder
    if training.key not in results.content["trainings"] or not (folder / "adapter_model.safetensors").is_file():
        started = time.process_time()
        run_recipe(
            recipe_of(training, folder), Console(file=io.StringIO()), command="python -m benchmarks.rlm.roots run"
        )
        seconds = time.process_time() - started
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        results.add_training(training, losses, seconds)
        report(f"trained  {training.key}: {len(losses)} steps, loss {losses[-1]:.3f}, {seconds:.0f} CPU s")
    return folder


def open_root(reference: str) -> HFModel:
    """Load a model, an adapter merged into its base: a third faster."""
    root = open_chat_model(reference, dtype=plan.DTYPE, batch_size=plan.GROUP)
    if isinstance(root.model, PeftModel):
        root.model = root.model.merge_and_unload()
    return root


def measure(cells: Sequence[RootCell], reference: str, results: RootResults, deadline: float, report: Report) -> bool:
    """Measure cells of one model, a group of trials at a time; return whether all are finished."""
    root = open_root(reference)
    limits = Limits(iterations=plan.ITERATIONS, root_tokens=plan.NEW_TOKENS, seconds=10.0**7)
    rlm = RLM(root, classifier(), limits=limits, system=SYSTEM_SHORT)
    for cell in cells:
        while not results.done(cell):
            if time.monotonic() >= deadline:
                report(f"next: {cell.key}")
                return False
            started, first = time.process_time(), len(results.trials(cell))
            seeds = range(first, min(first + plan.GROUP, plan.TRIALS))
            tasks = [(seed, make_task(cell.task, seed, plan.CHARS, phrasings=cell.phrasings)) for seed in seeds]
            results.add_trials(cell, run_trials("rlm", tasks, rlm), time.process_time() - started)
        trials = results.trials(cell)
        report(f"measured {cell.key}: {sum(trial.right for trial in trials)} of {len(trials)} right")
    return True
