"""Train the arms in turn; finished runs are reused, whichever command trained them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console

from eaftdrope.errors import UserError
from eaftdrope.recipe.schema import Recipe
from eaftdrope.run.folder import RunFolder
from eaftdrope.run.record import differences, read_record
from eaftdrope.run.train import run_recipe

from .plan import Arm, ComparisonPlan, arm_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

# Relative; a weight written with fewer digits is the same control.
WEIGHT_TOLERANCE = 0.01


Losses = Callable[["Arm"], "float | None"]
"""Held-out loss of a finished arm; None before it was measured."""


def _not_measured(arm: Arm) -> None:
    return None


def check_arms(plan: ComparisonPlan) -> None:
    """Check the folder of every arm before the first one is trained.

    Raises:
        UserError: a folder has other contents.
    """
    problems = []
    for arm in plan.trained:
        try:
            is_trained(plan, arm)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def is_trained(plan: ComparisonPlan, arm: Arm, losses: Losses = _not_measured) -> bool | None:
    """Return True if an arm, or the training that it repairs, is finished; None if its recipe depends on unfinished arms.

    Raises:
        UserError: as `is_finished`.
    """
    arm = plan.source_of(arm)
    depending = depending_changes(plan, arm, losses)
    return None if depending is None else is_finished(plan, arm, arm_recipe(plan, arm, depending))


def depending_changes(plan: ComparisonPlan, arm: Arm, losses: Losses) -> dict[str, str] | None:
    """Return the changes of an arm's recipe that finished arms determine; None if one of those is not finished."""
    changes = {}
    if arm.spec.is_matched_scale:
        if not is_trained(plan, plan.weight_source(arm), losses):
            return None
        changes["loss.weight"] = repr(_weight_of(plan, arm))
    if arm.spec.stops_early:
        level = _level_of(plan, arm, losses)
        if level is None:
            return None
        changes["train.stop_at"] = repr(level)
    return changes


def is_finished(plan: ComparisonPlan, arm: Arm, recipe: Recipe) -> bool:
    """Return True if the arm's folder contains a finished run of `recipe`. Probes may differ: they do not affect training.

    Raises:
        UserError: the folder contains an unfinished run of another recipe, a finished run with different training, or
            files that are not a run.
    """
    path = plan.path(arm)
    run = _read(path / "run.json")
    if run is None or run["status"] != "finished":
        return RunFolder(path, recipe, keep_finished=True).finished
    if keys := differences(
        _training(run["recipe"], path), recipe.model_dump(mode="json", exclude={"output", "probes"})
    ):
        raise UserError(
            f"{path} contains a finished run with different training (different: {keys}). Nothing was changed. Move it "
            "away, or choose another folder with --output."
        )
    return True


def train_arms(
    plan: ComparisonPlan, starting: Callable[[Arm, int], None], command: str, losses: Losses = _not_measured
) -> None:
    """Train the arms that are not finished and whose recipe is known: those that end early need measured arms.

    Args:
        starting: called with an arm and its number in the plan before it is trained.
        command: the command line, for the model cards.

    Raises:
        UserError, RunInterrupted: as `run_recipe`.
    """
    for number, arm in enumerate(plan.trained, start=1):
        depending = depending_changes(plan, arm, losses)
        if depending is None:
            continue
        recipe = arm_recipe(plan, arm, depending)
        if is_finished(plan, arm, recipe):
            continue
        starting(arm, number)
        # the plan was printed once for all arms
        with open(os.devnull, "w") as nowhere:
            run_recipe(recipe, Console(file=nowhere), command=command)
        # as large as three models, and no longer needed
        shutil.rmtree(plan.path(arm) / "checkpoints", ignore_errors=True)
        gc.collect()


def _weight_of(plan: ComparisonPlan, arm: Arm) -> float:
    """Return the weight of a constant, the mean gate of its finished eaft arm.

    A constant that was trained with this weight within `WEIGHT_TOLERANCE` keeps its own.
    """
    weight = float(f"{mean_gate(plan.path(plan.weight_source(arm))):.4g}")
    trained = _recorded(plan, arm, "loss", "weight")
    is_near = trained is not None and abs(trained - weight) <= WEIGHT_TOLERANCE * weight
    return trained if is_near else weight


def _level_of(plan: ComparisonPlan, arm: Arm, losses: Losses) -> float | None:
    """Return the loss at which an early stop ends: the highest of the other arms of its seed and rate; None if one of them
    was not measured. A run that has begun keeps its own."""
    recorded = _recorded(plan, arm, "train", "stop_at")
    if recorded is not None:
        return recorded
    found = [losses(other) for other in plan.beside(arm) if not other.spec.stops_early and not other.spec.repair]
    return None if None in found else float(f"{max(found):.6g}")


def _recorded(plan: ComparisonPlan, arm: Arm, section: str, key: str) -> float | None:
    """Return a value of the recipe of an arm's run; None without a run, or for a run of an older version."""
    run = _read(plan.path(arm) / "run.json")
    return run["recipe"][section].get(key) if run else None


def mean_gate(path: Path) -> float:
    """Return the mean gate over all trained tokens of a finished run."""
    total = tokens = 0.0
    for row in _metrics(path):
        if "eaft/gate_mean" in row:
            # a running total
            seen = row["eaft/trained_tokens"] - tokens
            total, tokens = total + seen * row["eaft/gate_mean"], row["eaft/trained_tokens"]
    return total / tokens


def training_facts(path: Path) -> dict:
    """Return the entries of compare.json on a finished arm's training."""
    rows = _metrics(path)
    return {"mean_gate": mean_gate(path), "steps": max(row["step"] for row in rows)}


def stamp(path: Path) -> str:
    """Return an identifier of a training: the timings in its log are unique."""
    return hashlib.sha256((path / "metrics.jsonl").read_bytes()).hexdigest()[:16]


def train_seconds(path: Path) -> float | None:
    """Return the training time of a finished arm, since its last resume."""
    return next((row["train_runtime"] for row in _metrics(path) if "train_runtime" in row), None)


def _metrics(path: Path) -> list[dict]:
    file = path / "metrics.jsonl"
    with _damage_to_user_error(file):
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _training(record: dict, path: Path) -> dict:
    """Return the part of a run's record that determines its weights, with defaults for keys that its version did not have."""
    try:
        others = {name: section for name, section in record.items() if name != "probes"}
        recipe = Recipe.model_validate({**others, "output": {"dir": str(path)}})
    except ValidationError as error:
        raise UserError(
            f"{path} contains a run of another version of eaftdrope, whose recipe this version cannot read: "
            f"{error.errors()[0]['msg']}. Move it away, or choose another folder with --output."
        ) from error
    return recipe.model_dump(mode="json", exclude={"output", "probes"})


def _read(file: Path) -> dict | None:
    """Return run.json of an arm; None if it is missing or damaged, which starting the arm checks."""
    return read_record(file.parent)


@contextlib.contextmanager
def _damage_to_user_error(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). Move its folder away to train the arm again.") from error
