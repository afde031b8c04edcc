"""lm-eval (EleutherAI's evaluation harness) on a loaded model; no other file imports it, except one_bos.py.

tasks = find_tasks(["mmlu", "ifeval"], include=None)       # refuses unknown names and unavailable data
found = run_tasks(model, tokenizer, ["mmlu"], batch_size=8, limit=100, manager=tasks.manager)
scores = harness_scores(found, "mmlu")
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError

from .score_cache import versions
from .scores import Score, score_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'eaftdrope[eval]'"
PROBE = "lm-eval"
_TASK_FILES = (".yaml", ".yml", ".py", ".jinja", ".jinja2")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that exist; `fingerprints` has a hash of each one's settings and data, by name."""

    names: tuple[str, ...]
    manager: Any
    fingerprints: dict[str, str]


def missing(why: str) -> str | None:
    """Return the message for a missing lm-eval, None if it is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return f"{why} is measured by lm-eval, which is not installed. Run `{INSTALL}`, or leave it out."
    return None


def find_tasks(names: list[str], *, include: Path | None) -> HarnessTasks:
    """Find the tasks and fetch their data.

    Args:
        names: of tasks, groups of tasks or tags.
        include: a folder with the user's own task files (YAML), which take precedence over lm-eval's of the same name.

    Raises:
        UserError: a task does not exist, or its data or a package that it needs is not available.
    """
    from lm_eval.tasks import TaskManager

    # it warns about every default that a task keeps
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = None
    if include is not None:
        # without reading its own 14,000 files, which may not be needed
        manager = TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=None if include is None else str(include))
    problems = [_unknown(name, manager) for name in names if name not in manager.all_tasks]
    if problems:
        raise UserError(" ".join(problems))
    return HarnessTasks(tuple(names), manager, {name: _fingerprint(name, manager, include) for name in names})


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    *,
    batch_size: int,
    limit: int | None,
    max_length: int | None = None,
    manager: Any = None,
    metadata: dict | None = None,
    chat: bool = False,
    samples: bool = True,
) -> dict:
    """Return lm-eval's own result.

    Args:
        manager: lm-eval's task manager, for the user's own tasks.
        metadata: settings for tasks that are generated for a length.
        chat: apply the chat template to the prompts.
        samples: keep the result of every row.

    Raises:
        OSError, ImportError, ValueError: data or a package is not available.
    """
    import lm_eval

    from .one_bos import OneBos

    longest: dict[str, Any] = {} if max_length is None else {"max_length": max_length}
    wrapped = OneBos(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **longest)
    chosen: dict[str, Any] = {"task_manager": manager} if manager is not None else {}
    chosen |= {"metadata": metadata} if metadata is not None else {}
    return lm_eval.simple_evaluate(
        model=wrapped,
        tasks=names,
        limit=limit,
        log_samples=samples,
        bootstrap_iters=1000,
        apply_chat_template=chat,
        **chosen,
    )


def harness_scores(found: dict, name: str) -> list[Score]:
    """Return every metric of a task; for a group, lm-eval's average; for a group without one and for a tag, each task's.

    A score has units if the metric is the mean of its rows: two models are then compared row by row.
    """
    groups = found.get("group_subtasks", {})
    children = {child for inside in groups.values() for child in inside}
    tops = [name] if name in found["results"] or name in groups else [n for n in found["results"] if n not in children]
    return [score for top in tops for shown in _with_numbers(top, found) for score in _task_scores(shown, found)]


def _with_numbers(name: str, found: dict) -> list[str]:
    """Return the task or group itself if it has values, else its members."""
    if _numbers(found["results"].get(name, {})):
        return [name]
    return [shown for child in found["group_subtasks"].get(name, []) for shown in _with_numbers(child, found)]


def _leaves(name: str, found: dict) -> list[str]:
    inside = found.get("group_subtasks", {}).get(name)
    return [name] if not inside else [leaf for child in inside for leaf in _leaves(child, found)]


def _task_scores(name: str, found: dict) -> list[Score]:
    values, scores = _numbers(found["results"][name]), []
    for key, value in values.items():
        metric, filtered = key.split(",")
        if metric.endswith("_stderr"):
            continue
        units = _units(found, name, metric, filtered, value)
        counts = [found["n-samples"].get(leaf, {}).get("effective", 0) for leaf in _leaves(name, found)]
        error = values.get(f"{metric}_stderr,{filtered}")
        kind = "share" if units and {total for total, _ in units} <= {0.0, 1.0} else "mean"
        scores.append(
            Score(
                probe=PROBE,
                group="general",
                metric=f"{name}: {metric}" + ("" if filtered == "none" else f" ({filtered})"),
                value=float(value),
                stderr=_stderr(error, kind, units),
                n=len(units) or sum(counts),
                # lm-eval's own default
                better="lower" if found["higher_is_better"].get(name, {}).get(metric) is False else "higher",
                kind=kind,
                units=units,
            )
        )
    return scores


def _stderr(error: float | None, kind: str, units: tuple[tuple[float, float], ...]) -> float | None:
    """Return lm-eval's standard error, or ours where its own is 0: all rows right or all wrong. None if it is unknown."""
    if error and math.isfinite(error):
        return float(error)
    return (
        score_units(PROBE, "general", "", list(units), kind=kind, better="higher").stderr if kind == "share" else None
    )


def _numbers(values: dict) -> dict[str, float]:
    """Return the "metric,filter" -> value entries of a result; the others are text."""
    return {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}


def _units(found: dict, name: str, metric: str, filtered: str, value: float) -> tuple[tuple[float, float], ...]:
    """Return (value, 1) of every row if the metric is their mean, else ()."""
    marks = []
    for leaf in _leaves(name, found):
        rows = [row for row in found.get("samples", {}).get(leaf, []) if row["filter"] == filtered]
        marks += [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
    if not marks or not all(isinstance(mark, int | float) for mark in marks):
        return ()
    if not math.isclose(math.fsum(marks) / len(marks), value, rel_tol=1e-9, abs_tol=1e-12):
        return ()
    return tuple((float(mark), 1.0) for mark in marks)


def _unknown(name: str, manager: Any) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, n=2, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"lm-eval has no task {name!r}.{hint} For your own tasks, pass --include-path FOLDER with their YAML files."


def _fingerprint(name: str, manager: Any, include: Path | None) -> str:
    """Return a hash of all that determines the score of a task or group: settings, data, task files, libraries."""
    try:
        loaded = manager.load([name])["tasks"]
    except Exception as error:  # a task file may run any Python
        raise UserError(cannot_measure(name, error)) from error
    parts: list[Any] = [versions(_requirements()), None if include is None else _files_hash(include)]
    for task_name, task in sorted(loaded.items()):
        settings = {key: str(value) for key, value in task.dump_config().items()}
        parts.append(
            [task_name, settings, {split: _data_fingerprint(rows) for split, rows in (task.dataset or {}).items()}]
        )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _requirements() -> list[str]:
    """Return lm-eval and every package that one of its tasks may score with."""
    names = {match[0] for requirement in requires("lm-eval") or [] if (match := re.match(r"[\w.-]+", requirement))}
    return ["lm-eval", *sorted(names)]


def _files_hash(folder: Path) -> str:
    """Return a hash of the task files in `folder` and of the Python files beside them, which have their functions.

    Hidden folders and environments are left out.
    """
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "site-packages")
        for file in sorted(Path(place, name) for name in files if name.endswith(_TASK_FILES)):
            digest.update(f"{file.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _data_fingerprint(rows: Any) -> str:
    """Return the fingerprint that `datasets` keeps of its rows; rows of another kind are hashed."""
    stored = getattr(rows, "_fingerprint", None)
    return stored or hashlib.sha256(json.dumps(list(rows), default=str).encode()).hexdigest()


def cannot_measure(name: str, error: Exception) -> str:
    """Return the message for a task whose data is not available or whose measurement failed."""
    reason = " ".join(str(error).split())
    if not isinstance(error, OSError | ImportError | ValueError):
        return f"lm-eval cannot measure {name}: {type(error).__name__}: {reason} Correct the task, or leave it out."
    return (
        f"lm-eval cannot measure {name}: {reason} It downloads a task's data (HF_HUB_OFFLINE must not be set, unless the "
        "data is in the hub's cache), and some tasks need more packages, such as `pip install 'lm-eval[ifeval,math]'`."
    )
