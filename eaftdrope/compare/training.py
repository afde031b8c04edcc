"""Training the arms, one after the other; finished ones are kept, whoever trained them."""

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

from eaftdrope.errors import UserError
from eaftdrope.recipe.schema import Recipe
from eaftdrope.run.folder import RunFolder
from eaftdrope.run.record import differences, read_record

from .arms import Arm, Plan, arm_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Relative; a weight that was typed with fewer digits is the same control.
WEIGHT_TOLERANCE = 0.01


def check_arms(plan: Plan) -> None:
    """Looks at every arm's folder before the first is trained.

    Raises:
        UserError: one of them holds something else.
    """
    problems = []
    for arm in plan.arms:
        try:
            is_trained(plan, arm)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def is_trained(plan: Plan, arm: Arm) -> bool | None:
    """Whether an arm is finished; None for a constant whose weight is not known before its eaft arm is.

    Raises:
        UserError: as `is_finished`.
    """
    if arm.gate.is_matched_scale and not is_trained(plan, plan.source_of_weight(arm)):
        return None
    return is_finished(plan, arm, arm_recipe(plan, arm, weight=weight_of(plan, arm)))


def is_finished(plan: Plan, arm: Arm, recipe: Recipe) -> bool:
    """Whether the arm's folder holds a finished run of `recipe`; with which probes does not matter, its training is the
    same.

    Raises:
        UserError: it holds an unfinished run of another recipe, a finished one that was trained otherwise, or strangers'
            files.
    """
    path = plan.path(arm)
    run = _read(path / "run.json")
    if run is None or run["status"] != "finished":
        return RunFolder(path, recipe, keep_finished=True).finished
    if keys := differences(
        _training(run["recipe"], path), recipe.model_dump(mode="json", exclude={"output", "probes"})
    ):
        raise UserError(
            f"{path} holds a finished run that was trained otherwise (different: {keys}). Nothing was touched: move it "
            "away, or name another folder with --output."
        )
    return True


def train_arms(plan: Plan, said: Callable[[Arm, int], None], command: str) -> None:
    """Trains what is not finished yet.

    Args:
        said: called with an arm and its place in the plan before it is trained.
        command: what the user typed, for the model cards.

    Raises:
        UserError, RunInterrupted: as `run_recipe`.
    """
    from rich.console import Console

    from eaftdrope.run.train import run_recipe

    for number, arm in enumerate(plan.arms, start=1):
        recipe = arm_recipe(plan, arm, weight=weight_of(plan, arm))
        if is_finished(plan, arm, recipe):
            continue
        said(arm, number)
        # its plan was shown once, for all of them
        with open(os.devnull, "w") as nowhere:
            run_recipe(recipe, Console(file=nowhere), command=command)
        # as large as three models, and of no use any more
        shutil.rmtree(plan.path(arm) / "checkpoints", ignore_errors=True)
        gc.collect()


def weight_of(plan: Plan, arm: Arm) -> float | None:
    """The weight of a constant: the mean gate of its eaft arm, which is finished; None for any other gate.

    A finished constant whose weight is that within `WEIGHT_TOLERANCE` keeps its own.
    """
    if not arm.gate.is_matched_scale:
        return None
    weight = float(f"{mean_gate(plan.path(plan.source_of_weight(arm))):.4g}")
    run = _read(plan.path(arm) / "run.json")
    theirs = run["recipe"]["loss"]["weight"] if run else None
    is_near = theirs is not None and abs(theirs - weight) <= WEIGHT_TOLERANCE * weight
    return theirs if is_near else weight


def mean_gate(path: Path) -> float:
    """Mean gate of all trained tokens of a finished run."""
    total = tokens = 0.0
    for row in _metrics(path):
        if "eaft/gate_mean" in row:
            # a running total
            seen = row["eaft/trained_tokens"] - tokens
            total, tokens = total + seen * row["eaft/gate_mean"], row["eaft/trained_tokens"]
    return total / tokens


def facts(path: Path) -> dict:
    """What compare.json says of a finished arm's training."""
    rows = _metrics(path)
    return {"mean_gate": mean_gate(path), "steps": max(row["step"] for row in rows)}


def stamp(path: Path) -> str:
    """Of a training: the times in its log are those of no other."""
    return hashlib.sha256((path / "metrics.jsonl").read_bytes()).hexdigest()[:16]


def seconds(path: Path) -> float | None:
    """How long a finished arm's last start has trained."""
    return next((row["train_runtime"] for row in _metrics(path) if "train_runtime" in row), None)


def _metrics(path: Path) -> list[dict]:
    file = path / "metrics.jsonl"
    with _damage_told(file):
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _training(record: dict, path: Path) -> dict:
    """What of a run's record decides its weights. Keys that the version which trained it did not have get their defaults."""
    try:
        others = {name: section for name, section in record.items() if name != "probes"}
        recipe = Recipe.model_validate({**others, "output": {"dir": str(path)}})
    except ValidationError as error:
        raise UserError(
            f"{path} holds a run of another version of eaftdrope, whose recipe this one cannot read: "
            f"{error.errors()[0]['msg']}. Move it away, or name another folder with --output."
        ) from error
    return recipe.model_dump(mode="json", exclude={"output", "probes"})


def _read(file: Path) -> dict | None:
    """run.json of an arm; None where there is none, or it is damaged: training the arm again looks into that."""
    return read_record(file.parent)


@contextlib.contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). Move its folder away, and the arm is trained again.") from error
