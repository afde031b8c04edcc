"""Train the arms in turn; finished runs are reused, whichever command trained them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
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
    from collections.abc import Callable, Iterator

# Relative; a weight written with fewer digits is the same control.
WEIGHT_TOLERANCE = 0.01


def check_arms(plan: ComparisonPlan) -> None:
    """Check the folder of every arm before the first one is trained.

    Raises:
        UserError: a folder has other contents.
    """
    problems = []
    for arm in plan.arms:
        try:
            is_trained(plan, arm)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def is_trained(plan: ComparisonPlan, arm: Arm) -> bool | None:
    """Return True if an arm is finished; None for a constant whose weight depends on an unfinished arm.

    Raises:
        UserError: as `is_finished`.
    """
    if arm.gate.is_matched_scale and not is_trained(plan, plan.weight_source(arm)):
        return None
    return is_finished(plan, arm, arm_recipe(plan, arm, weight=weight_of(plan, arm)))


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


def train_arms(plan: ComparisonPlan, starting: Callable[[Arm, int], None], command: str) -> None:
    """Train the arms that are not finished.

    Args:
        starting: called with an arm and its number in the plan before it is trained.
        command: the command line, for the model cards.

    Raises:
        UserError, RunInterrupted: as `run_recipe`.
    """
    for number, arm in enumerate(plan.arms, start=1):
        recipe = arm_recipe(plan, arm, weight=weight_of(plan, arm))
        if is_finished(plan, arm, recipe):
            continue
        starting(arm, number)
        # the plan was printed once for all arms
        with open(os.devnull, "w") as nowhere:
            run_recipe(recipe, Console(file=nowhere), command=command)
        # as large as three models, and no longer needed
        shutil.rmtree(plan.path(arm) / "checkpoints", ignore_errors=True)
        gc.collect()


def weight_of(plan: ComparisonPlan, arm: Arm) -> float | None:
    """Return the weight of a constant, the mean gate of its finished eaft arm; None for any other gate.

    A constant that was trained with this weight within `WEIGHT_TOLERANCE` keeps its own.
    """
    if not arm.gate.is_matched_scale:
        return None
    weight = float(f"{mean_gate(plan.path(plan.weight_source(arm))):.4g}")
    run = _read(plan.path(arm) / "run.json")
    trained = run["recipe"]["loss"]["weight"] if run else None
    is_near = trained is not None and abs(trained - weight) <= WEIGHT_TOLERANCE * weight
    return trained if is_near else weight


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
