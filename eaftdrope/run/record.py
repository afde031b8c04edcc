"""run.json: which recipe a run is of, how far it got, and what it was begun with.

status        "running"; "trained" once the result and its scores are whole and what is drawn from them is still to
              come (card, merged model, report, upload); "finished", written last
recipe        the recipe without `output`
processes     how many share a step
data          counts of the training rows
fingerprints  hashes of what must not change between two starts; older versions kept none
versions, about, uploaded
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope import files
from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from eaftdrope.recipe.schema import Recipe

    from .plan import DataStats

NAME, RECIPE_NAME = "run.json", "recipe.yaml"
STATUSES = ("running", "trained", "finished")
_KEYS = {"status", "recipe", "processes", "data"}
_COUNTS = ("rows", "tokens", "trained_tokens")
# they decide what is kept and shown of a training, and nothing of what is trained
_FREE_KEYS = ("train.save_every", "train.keep_checkpoints", "train.log_every")


def read_record(folder: Path) -> dict | None:
    """run.json of a folder; None where there is none, another program's of that name, or a damaged one."""
    run = read_json(folder / NAME)
    return run if isinstance(run, dict) and run.keys() >= _KEYS and _is_sound(run) else None


def is_damaged(folder: Path) -> bool:
    """Whether run.json exists and is damaged: not JSON, or with values that no version of eaftdrope writes."""
    if not (folder / NAME).is_file():
        return False
    run = read_json(folder / NAME)
    return run is None or (isinstance(run, dict) and run.keys() >= _KEYS and not _is_sound(run))


def recorded_recipe(folder: Path) -> Recipe | None:
    """The recipe that a start has left beside run.json; None where there is none that can be read."""
    from eaftdrope.recipe.load import load_recipe

    try:
        return load_recipe(folder / RECIPE_NAME)
    except UserError:
        return None


def _is_sound(run: dict) -> bool:
    counts, fingerprints = run["data"], run.get("fingerprints", {})
    return (
        run["status"] in STATUSES
        and isinstance(run["recipe"], dict)
        and type(run["processes"]) is int
        and isinstance(counts, dict)
        # a stage without training has none
        and (all(type(counts.get(name)) is int for name in _COUNTS) or (not counts and run["status"] == "finished"))
        and isinstance(fingerprints, dict)
        and all(isinstance(value, str) for value in fingerprints.values())
    )


def changes(run: dict, data: DataStats, fingerprints: dict[str, str]) -> str:
    """What of the data and the base model is not as the run began with it, as the rest of a sentence; "" for nothing."""
    then, now = run["data"], asdict(data)
    if then != now:
        return f" on other data: {_data_text(then)} then, {_data_text(now)} now."
    before = run.get("fingerprints", {})
    changed = [name for name in fingerprints if name in before and before[name] != fingerprints[name]]
    if not changed:
        return ""
    return f", and {' and '.join(changed)} changed since the start. Put back what there was and run the same command again."


def _data_text(counts: dict[str, int]) -> str:
    return f"{counts['rows']:,} rows with {counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them trained"


def dumped(recipe: Recipe) -> dict:
    return recipe.model_dump(mode="json", exclude={"output"})


def without_nulls(data: object) -> object:
    """As `dump_recipe` writes a recipe: an entry of the probes has one name, and not every other one set to null."""
    if isinstance(data, dict):
        return {key: without_nulls(value) for key, value in data.items() if value is not None}
    return [without_nulls(value) for value in data] if isinstance(data, list) else data


def read_json(file: Path) -> object:
    """The content, None where there is no file or it is not (all of) a JSON document."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def differences(old: dict, new: dict, *, free: bool = False) -> str:
    """Dotted keys whose values differ, with both values; "" where none do.

    Args:
        free: leave out the keys that decide nothing of what is trained.
    """
    changed = files.differences(old, new)
    if free:
        changed = {key: pair for key, pair in changed.items() if key.removeprefix("recalibrate.") not in _FREE_KEYS}
    shown = [f"{key}: {_text(then)} then, {_text(now)} now" for key, (then, now) in list(changed.items())[:6]]
    return "; ".join(shown) + ("; ..." if len(changed) > 6 else "")


def _text(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
