"""Scores in the files of other tools, so that their viewers open them.

    lm_eval/MODEL/results_DATE.json     as lm-eval 0.4.13 writes its aggregated results
    inspect_ai/DATE_PROBE_ID.json       a log as inspect-ai 0.3.285 reads it (version 2): one per model and probe

Both have what was measured and nothing else. lm-eval has one task per probe, and each metric with its standard error.
inspect-ai also has a sample per item, with its score; texts are not in the results, so its input states the item only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..lm_eval import PROBE
from ..scores import Score

if TYPE_CHECKING:
    from eaftdrope.files import ResultFolder

LM_EVAL_FOLDER, INSPECT_FOLDER = "lm_eval", "inspect_ai"


def write_other_formats(results: ResultFolder, found: dict[str, list[Score]]) -> None:
    """Write the files of every model into the folder of results; those of an earlier run of the same command are replaced.

    Args:
        results: with the document of the evaluation.
        found: model -> its scores.
    """
    document = results.document
    assert document is not None, "the results are written after the measurement"
    date = document["about"]["date"]
    references = {one["name"]: one["reference"] for one in document["models"]}
    for folder in (LM_EVAL_FOLDER, INSPECT_FOLDER):
        _remove_own(results, folder)
    for model, scores in found.items():
        name = f"{LM_EVAL_FOLDER}/{_file_name(references[model])}/results_{date.replace(':', '-')}.json"
        results.write(name, json.dumps(lm_eval_results(document, references[model], scores), indent=2) + "\n")
        for log in inspect_logs(document, references[model], scores):
            spec = log["eval"]
            file = f"{spec['created'].replace(':', '-')}_{_file_name(spec['task'])}_{spec['eval_id']}.json"
            results.write(f"{INSPECT_FOLDER}/{file}", json.dumps(log, indent=2) + "\n")


def _remove_own(results: ResultFolder, folder: str) -> None:
    """Remove the files that an earlier run wrote: their names contain its date, so they would not be replaced."""
    pattern = "*/results_*.json" if folder == LM_EVAL_FOLDER else "*_*_*.json"
    for file in (results.folder / folder).glob(pattern):
        file.unlink()


def _by_task(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Return the scores by task: the task of lm-eval, or the probe with the suffix that tells two of its kind apart."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        task, _, metric = score.metric.partition(": ")
        if score.probe == PROBE:
            found.setdefault(task, []).append(replace(score, metric=metric))
            continue
        suffix = re.search(r" \(([^()]*)\)$", score.metric)
        found.setdefault(score.probe if suffix is None else f"{score.probe} ({suffix[1]})", []).append(score)
    return found


def _file_name(text: str) -> str:
    # "_" separates the parts of the name of a log
    return re.sub(r"[^a-zA-Z0-9.-]+", "-", text).strip("-")


def lm_eval_results(document: dict[str, Any], reference: str, scores: Sequence[Score]) -> dict[str, Any]:
    """Return the scores of a model as lm-eval's aggregated results."""
    tasks = _by_task(scores)
    about, options = document["about"], document["settings"]
    return {
        "results": {task: _lm_eval_task(task, own) for task, own in tasks.items()},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: {"task": task, "metadata": {"version": document["schema"]}} for task in tasks},
        "versions": {task: document["schema"] for task in tasks},
        "n-shot": {task: 0 for task in tasks},
        "higher_is_better": {
            task: {_lm_eval_metric(score): score.better == "higher" for score in own} for task, own in tasks.items()
        },
        "n-samples": {
            task: {"original": max(s.n for s in own), "effective": max(s.n for s in own)} for task, own in tasks.items()
        },
        "config": {
            "model": "eaftdrope",
            "model_args": f"pretrained={reference}",
            "device": options["setting"].split(" ")[0],
            "model_dtype": options["setting"].split(" ")[-1],
            "limit": options["limit"],
            "batch_size": None,
            "gen_kwargs": None,
            "bootstrap_iters": 0,
        },
        "date": datetime.fromisoformat(about["date"]).timestamp(),
        "transformers_version": about["versions"]["transformers"],
        "model_source": "eaftdrope",
        "model_name": reference,
        "model_name_sanitized": _file_name(reference),
    }


def _lm_eval_task(task: str, scores: Sequence[Score]) -> dict[str, Any]:
    entry: dict[str, Any] = {"alias": task}
    for score in scores:
        name = _lm_eval_metric(score)
        entry[f"{name},none"] = score.value
        entry[f"{name}_stderr,none"] = "N/A" if score.stderr is None else score.stderr
    return entry


def _lm_eval_metric(score: Score) -> str:
    """Return a metric's name without commas, which separate the filter from it."""
    return score.metric.replace(",", "")


def inspect_logs(document: dict[str, Any], reference: str, scores: Sequence[Score]) -> Iterator[dict[str, Any]]:
    """Yield a log of inspect-ai for each probe of a model."""
    about = document["about"]
    for task, own in _by_task(scores).items():
        ids = [hashlib.sha256(f"{part}{about['date']}".encode()).hexdigest()[:22] for part in ("", reference + task)]
        n = max(score.n for score in own)
        yield {
            "version": 2,
            "status": "success",
            "eval": {
                "eval_id": ids[1],
                "run_id": ids[0],
                "task_id": hashlib.sha256(task.encode()).hexdigest()[:22],
                "created": about["date"],
                "task": task,
                "task_version": document["schema"],
                "dataset": {"name": own[0].probe, "samples": n, "sample_ids": list(range(1, n + 1))},
                "model": f"eaftdrope/{reference}",
                "model_args": {},
                "config": {"limit": document["settings"]["limit"]},
                "packages": {"eaftdrope": about["versions"]["eaftdrope"]},
                "scorers": [{"name": score.metric} for score in own],
            },
            "plan": {"name": "plan", "steps": []},
            "results": {"total_samples": n, "completed_samples": n, "scores": [_inspect_score(s) for s in own]},
            "stats": {"started_at": about["date"], "completed_at": about["date"]},
            "samples": list(_inspect_samples(task, own)),
        }


def _inspect_score(score: Score) -> dict[str, Any]:
    metrics = {"value": score.value, "stderr": score.stderr}
    return {
        "name": score.metric,
        "scorer": score.metric,
        "scored_samples": score.n,
        "unscored_samples": 0,
        "metadata": {"group": score.group, "better": score.better, "kind": score.kind},
        "metrics": {
            name: {"name": name, "value": value, "params": {}} for name, value in metrics.items() if value is not None
        },
    }


def _inspect_samples(task: str, scores: Sequence[Score]) -> Iterator[dict[str, Any]]:
    """Yield a sample per item: a share's hit or miss, else the mean of the item (nats per token)."""
    for index in range(max(len(score.units) for score in scores)):
        items = {score.metric: score.units[index] for score in scores if index < len(score.units)}
        yield {
            "id": index + 1,
            "epoch": 1,
            "input": f"item {index + 1} of {task}; the results have no texts",
            "target": "",
            "scores": {
                metric: {"value": total / weight if weight else 0.0, "metadata": {"total": total, "weight": weight}}
                for metric, (total, weight) in items.items()
            },
        }
