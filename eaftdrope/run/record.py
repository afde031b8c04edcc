"""run.json: the recipe of a run, how far it got, and what it was begun with.

status        "running"; "trained" once the result and its scores are complete and only their presentation is left (card,
              merged model, report, upload); "finished", written last
recipe        the recipe without `output` and `serve`
processes     data-parallel ranks: processes that share the rows of a step
data          counts of the training rows
fingerprints  hashes that must not change between two starts; older versions have none
versions, about, uploaded
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eaftdrope import files
from eaftdrope.errors import UserError
from eaftdrope.recipe.load import load_recipe
from eaftdrope.recipe.schema import Recipe

NAME, RECIPE_NAME = "run.json", "recipe.yaml"
SERVE_FILE = "serve.yaml"
"""The recipe's section `serve`, beside its stages."""
STATUSES = ("running", "trained", "finished")
_KEYS = {"status", "recipe", "processes", "data"}
_COUNTS = ("rows", "tokens", "trained_tokens")
# keys that decide what is kept and shown of a training, and nothing of its result
_FREE_KEYS = (
    "train.save_every",
    "train.save_every_minutes",
    "train.keep_checkpoints",
    "train.log_every",
    # the rows of a step and the engine of its checkpoints are compared, whoever sets them
    "parallel.preset",
    "parallel.tp",
    "parallel.fsdp",
    "parallel.cp",
    "parallel.dp",
    "parallel.timeout_minutes",
)


@dataclass(frozen=True)
class DataStats:
    """Counts of the training rows; tokens are after truncation."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int = 0
    skipped: int = 0


def read_record(folder: Path) -> dict | None:
    """run.json of a folder; None if it is missing, damaged, or another program's file of that name."""
    run = read_json(folder / NAME)
    return run if isinstance(run, dict) and run.keys() >= _KEYS and _is_sound(run) else None


def is_damaged(folder: Path) -> bool:
    """True if run.json exists and is damaged: not JSON, or with values that no version of eaftdrope writes."""
    if not (folder / NAME).is_file():
        return False
    run = read_json(folder / NAME)
    return run is None or (isinstance(run, dict) and run.keys() >= _KEYS and not _is_sound(run))


def recorded_recipe(folder: Path) -> Recipe | None:
    """The recipe stored beside run.json; None if it is missing or cannot be read."""
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
    """Changes of the data and the base model since the run began, as the rest of a sentence; "" without any."""
    then, now = run["data"], asdict(data)
    if then != now:
        return f" on other data: {_data_text(then)} then, {_data_text(now)} now."
    before = run.get("fingerprints", {})
    changed = [name for name in fingerprints if name in before and before[name] != fingerprints[name]]
    if not changed:
        return ""
    return f", and {' and '.join(changed)} changed since its start. Restore the former state and run the same command again."


def _data_text(counts: dict[str, int]) -> str:
    return f"{counts['rows']:,} rows with {counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them trained"


def dumped(recipe: Recipe) -> dict:
    """The recipe as run.json stores it: without the sections that do not affect what is trained."""
    return recipe.model_dump(mode="json", exclude={"output", "serve"})


def without_nulls(data: Any) -> Any:
    """`data` without keys that are null, as `dump_recipe` writes it: an entry of the probes then has its one name only."""
    if isinstance(data, dict):
        return {key: without_nulls(value) for key, value in data.items() if value is not None}
    return [without_nulls(value) for value in data] if isinstance(data, list) else data


def read_json(file: Path) -> object:
    """The content of a file; None if it is missing or not a complete JSON document."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def differences(old: dict, new: dict, *, free: bool = False, also_free: tuple[str, ...] = ()) -> str:
    """Dotted keys whose values differ, with both values; "" without any.

    Args:
        free: leave out the keys that do not affect the result.
        also_free: further keys to leave out.
    """
    changed = files.differences(old, new)
    if free:
        changed = {
            key: pair for key, pair in changed.items() if _in_section(key) not in _FREE_KEYS and key not in also_free
        }
    shown = [f"{key}: {_text(then)} then, {_text(now)} now" for key, (then, now) in list(changed.items())[:6]]
    return "; ".join(shown) + ("; ..." if len(changed) > 6 else "")


def _in_section(key: str) -> str:
    """The key without the stage that has the section."""
    return key.removeprefix("pretrain.").removeprefix("recalibrate.").removeprefix("ttt.")


def _text(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
