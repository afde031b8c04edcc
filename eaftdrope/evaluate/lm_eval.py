"""lm-eval (EleutherAI's evaluation harness) on a model that is loaded already; imported here only.

tasks = find_tasks(["mmlu", "ifeval"], include=None)       # unknown names and data that cannot be had, before any model
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
from typing import Any

from eaftdrope.errors import UserError

from .score_cache import versions
from .scores import Score, score_units

INSTALL = "pip install 'eaftdrope[eval]'"
PROBE = "lm-eval"
_TASK_FILES = (".yaml", ".yml", ".py", ".jinja", ".jinja2")


@dataclass(frozen=True)
class HarnessTasks:
    """HarnessTasks that are there. `prints` tells, by name, what a task asks: its settings and its data."""

    names: tuple[str, ...]
    manager: Any
    prints: dict[str, str]


def missing(why: str) -> str | None:
    """What to say where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return f"{why} is measured by lm-eval, which is not installed. Run `{INSTALL}`, or leave it out."
    return None


def find_tasks(names: list[str], *, include: Path | None) -> HarnessTasks:
    """Look the tasks up and fetch their data.

    Args:
        include: a folder with task files of one's own (YAML), which win over lm-eval's of the same name.

    Raises:
        UserError: lm-eval does not know a task, or cannot get its data or a package that it needs.
    """
    from lm_eval.tasks import TaskManager

    # it warns of every default that a task leaves as it is
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = None
    if include is not None:
        # without reading the 14,000 files of its own, where they are not needed
        manager = TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=None if include is None else str(include))
    problems = [_unknown(name, manager) for name in names if name not in manager.all_tasks]
    if problems:
        raise UserError(" ".join(problems))
    return HarnessTasks(tuple(names), manager, {name: _print(name, manager, include) for name in names})


def run_tasks(
    model,
    tokenizer,
    names: list[str],
    *,
    batch_size: int,
    limit: int | None,
    max_length: int | None = None,
    manager=None,
    metadata: dict | None = None,
    chat: bool = False,
    samples: bool = True,
) -> dict:
    """lm-eval's own result. `manager` has tasks of one's own, `metadata` is what tasks that are made for a length read;
    `chat` puts the prompts through the chat template.

    Raises:
        OSError, ImportError, ValueError: data or a package that cannot be had.
    """
    import lm_eval

    from .one_bos import OneBos

    longest = {} if max_length is None else {"max_length": max_length}
    wrapped = OneBos(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **longest)
    chosen = {"task_manager": manager} if manager is not None else {}
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
    """Every metric of a task. Of a group of tasks the average that lm-eval makes; where it makes none, and of a tag, those of
    each task.

    Units are there where a metric is the mean of its rows: two models are then compared row by row.
    """
    groups = found.get("group_subtasks", {})
    children = {child for inside in groups.values() for child in inside}
    tops = [name] if name in found["results"] or name in groups else [n for n in found["results"] if n not in children]
    return [score for top in tops for shown in _with_numbers(top, found) for score in _task_scores(shown, found)]


def _with_numbers(name: str, found: dict) -> list[str]:
    """The task or group itself if it has values, else what is in it."""
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
    """lm-eval's own; where all rows are right or all are wrong it is 0, and ours is not. None where it is not known."""
    if error and math.isfinite(error):
        return float(error)
    return (
        score_units(PROBE, "general", "", list(units), kind=kind, better="higher").stderr if kind == "share" else None
    )


def _numbers(values: dict) -> dict[str, float]:
    """ "metric,filter" -> value; the rest of a result is words."""
    return {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}


def _units(found: dict, name: str, metric: str, filtered: str, value: float) -> tuple[tuple[float, float], ...]:
    """(value, 1) of every row, where their mean is the metric; () where it is not made so."""
    marks = []
    for leaf in _leaves(name, found):
        rows = [row for row in found.get("samples", {}).get(leaf, []) if row["filter"] == filtered]
        marks += [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
    if not marks or not all(isinstance(mark, int | float) for mark in marks):
        return ()
    if not math.isclose(math.fsum(marks) / len(marks), value, rel_tol=1e-9, abs_tol=1e-12):
        return ()
    return tuple((float(mark), 1.0) for mark in marks)


def _unknown(name: str, manager) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, n=2, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"lm-eval has no task {name!r}.{hint} HarnessTasks of your own: --include-path FOLDER, with their YAML files."
    )


def _print(name: str, manager, include: Path | None) -> str:
    """A hash of all that decides a task's score, or that of every task of a group: settings, data, task files, libraries."""
    try:
        loaded = manager.load([name])["tasks"]
    except Exception as error:  # a task file may be anything, and run any Python
        raise UserError(cannot_measure(name, error)) from error
    what: list[Any] = [versions(_requirements()), None if include is None else _files_hash(include)]
    for task_name, task in sorted(loaded.items()):
        settings = {key: str(value) for key, value in task.dump_config().items()}
        what.append([task_name, settings, {split: _data_print(rows) for split, rows in (task.dataset or {}).items()}])
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _requirements() -> list[str]:
    """lm-eval and every package that one of its tasks may score with."""
    names = (re.match(r"[\w.-]+", requirement).group() for requirement in requires("lm-eval") or [])
    return ["lm-eval", *sorted(set(names))]


def _files_hash(folder: Path) -> str:
    """A hash of the task files in `folder` and of the Python beside them, which their functions are in. Hidden folders and
    environments, which a project's folder may have, are passed over."""
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "site-packages")
        for file in sorted(Path(place, name) for name in files if name.endswith(_TASK_FILES)):
            digest.update(f"{file.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _data_print(rows: Any) -> str:
    """`datasets` knows what its rows were made from; rows of another kind are read."""
    known = getattr(rows, "_fingerprint", None)
    return known or hashlib.sha256(json.dumps(list(rows), default=str).encode()).hexdigest()


def cannot_measure(name: str, error: Exception) -> str:
    """What to say when lm-eval could not get what a task needs, or could not measure it."""
    reason = " ".join(str(error).split())
    if not isinstance(error, OSError | ImportError | ValueError):
        return f"lm-eval cannot measure {name}: {type(error).__name__}: {reason} Correct the task, or leave it out."
    return (
        f"lm-eval cannot measure {name}: {reason} It downloads a task's data (HF_HUB_OFFLINE must not be set, unless they "
        "are in the hub's cache), and some tasks need packages of their own, such as `pip install 'lm-eval[ifeval,math]'`."
    )
