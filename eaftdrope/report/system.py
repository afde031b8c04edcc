"""system.json: what each stage of a pipeline did, collected from the files of its stages.

scores      every metric at every state: before the first training, and after each stage
changes     each stage against the state before it, with paired errors
positions   loss by position in a row, as the stage ttt logged it
answers     what `eaftdrope ask` answered: method, tokens, CPU seconds; loss and speed by position where it read
ablations   the last state with stages left out, or in another order, against that of the whole, with paired errors
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from eaftdrope.evaluate.scores import Score, scores_from_json
from eaftdrope.evaluate.verdicts import judge_changes
from eaftdrope.files import read_json, read_lines, write_atomically

from .positions import position_rows

SYSTEM_NAME = "system.json"
ABLATIONS = "ablations"
ANSWERS = Path("ask") / "answers.jsonl"
SCHEMA = 1
_RECORD = "run.json"


@dataclass(frozen=True)
class State:
    """The model of a pipeline at one point, and what was measured of it.

    Attributes:
        label: "start", or the stage that left it.
    """

    label: str
    scores: list[Score]


def is_pipeline(folder: Path) -> bool:
    """Whether the folder has stages, each with a run of its own."""
    return not (folder / _RECORD).is_file() and bool(_stage_records(folder))


def write_system(folder: Path) -> Path:
    """Collect system.json of a pipeline and write it."""
    return write_atomically(folder / SYSTEM_NAME, json.dumps(collect_system(folder), indent=2) + "\n")


def collect_system(folder: Path) -> dict[str, Any]:
    """The content of system.json; numbers of stages that are not finished are missing."""
    states = states_of(folder)
    stages = [name for name, _ in _stage_records(folder)]
    return {
        "schema": SCHEMA,
        "stages": stages,
        "states": [state.label for state in states],
        "scores": _scores(states),
        "changes": [
            {"stage": new.label, "before": old.label, **change}
            for old, new in pairwise(states)
            for change in paired_changes(old.scores, new.scores)
        ],
        "positions": [list(row) for row in position_rows(read_lines(folder / "ttt" / "metrics.jsonl"))],
        "answers": read_lines(folder / ANSWERS),
        "ablations": _ablations(folder, states),
    }


def states_of(folder: Path) -> list[State]:
    """The states of a pipeline in order. A stage without probes, such as drope, is measured by the one after it."""
    states: list[State] = []
    unmeasured = "start"
    for name, _ in _stage_records(folder):
        before, after = (_stored(folder / name / f"probes_{when}.json") for when in ("before", "after"))
        if unmeasured and before:
            states.append(State(unmeasured, before))
            unmeasured = ""
        if after:
            states.append(State(name, after))
        else:
            unmeasured = name
    return states


def paired_changes(before: Sequence[Score], after: Sequence[Score]) -> list[dict[str, Any]]:
    """Changes of the metrics that both states have on the same units, judged together."""
    old = {(score.probe, score.metric): score for score in before}
    pairs = [(old[key], score) for score in after if (key := (score.probe, score.metric)) in old]
    # held-out rows of two stages have one name and are not the same rows
    pairs = [(one, other) for one, other in pairs if _weights(one) == _weights(other)]
    return [
        {
            "metric": change.after.metric,
            "kind": change.after.kind,
            "better": change.after.better,
            "from": change.before.value,
            "to": change.after.value,
            "difference": change.difference,
            "stderr": change.stderr,
            "verdict": change.text,
        }
        for change in judge_changes(pairs)
    ]


def _weights(score: Score) -> list[float]:
    return [weight for _, weight in score.units]


def _scores(states: Sequence[State]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for state in states:
        for score in state.scores:
            entry = found.setdefault(
                (score.probe, score.metric, str(_weights(score))),
                {
                    "metric": score.metric,
                    "group": score.group,
                    "kind": score.kind,
                    "better": score.better,
                    "values": {},
                },
            )
            entry["values"][state.label] = {"value": score.value, "stderr": score.stderr, "n": score.n}
    return list(found.values())


def _ablations(folder: Path, states: Sequence[State]) -> list[dict[str, Any]]:
    """The last state of each ablation that is finished, against the last one of the whole pipeline."""
    found: list[dict[str, Any]] = []
    top = folder / ABLATIONS
    for path in sorted(top.iterdir()) if top.is_dir() and states else []:
        other = states_of(path)
        records = _stage_records(path)
        if other and all(status != "running" for _, status in records):
            changes = paired_changes(states[-1].scores, other[-1].scores)
            found.append({"name": path.name, "stages": [name for name, _ in records], "changes": changes})
    return found


def _stage_records(folder: Path) -> list[tuple[str, str]]:
    """(stage, status) of the runs below a folder, in the order in which they ran."""
    found = []
    for file in sorted(folder.glob(f"*/{_RECORD}")):
        record = read_json(file)
        stages = record.get("recipe", {}).get("stages") if isinstance(record, dict) else None
        if stages and stages[-1] == file.parent.name:
            found.append((len(stages), file.parent.name, record["status"]))
    return [(name, status) for _, name, status in sorted(found)]


def _stored(file: Path) -> list[Score]:
    return scores_from_json(file.read_text(encoding="utf-8")) if file.is_file() else []
