"""The results file: every measurement with its value per passage, so that paired differences can be computed again."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.loss.results import environment
from eaftdrope.errors import UserError
from eaftdrope.files import write_atomically

from . import plan
from .plan import Evaluate, PassKey, Task, Train

SCHEMA = 1
KINDS = {Evaluate: "losses", PassKey: "pass_keys", Train: "trainings"}


class Document:
    """Finished and unfinished results by kind and key, in `smollm2.json`. `settings` identify texts and model."""

    def __init__(self, file: Path, settings: dict | None = None) -> None:
        self.file = file
        # of the last run that wrote
        self.environment: dict = {}
        self.content: dict = {"schema": SCHEMA, "settings": settings, **{kind: {} for kind in KINDS.values()}}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))
            known = self.content["settings"]
            if settings is not None and known != settings:
                names = [name for name in settings if known.get(name) != settings[name]]
                raise UserError(
                    f"{file} has results of other settings ({', '.join(names)}). Choose another --output, or repeat that "
                    "run's command to resume it."
                )
        elif settings is None:
            raise UserError(f"{file}: no such file. `run` writes it.")

    def entry(self, task: Task) -> dict:
        """The entry of a task; a new one states where it is measured."""
        entries = self.content[KINDS[type(task)]]
        if task.key not in entries:
            entries[task.key] = {**vars(task), "values": [], "cpu_seconds": 0.0, "finished": False}
        return entries[task.key]

    def has(self, task: Task) -> bool:
        return self.content[KINDS[type(task)]].get(task.key, {}).get("finished", False)

    def write(self) -> None:
        """Write the file, one entry per line."""
        if not self.environment:
            self.environment = environment(os.environ.get("ONEDNN_MAX_CPU_ISA"))
        self.content["environment"] = self.environment
        head = {name: value for name, value in self.content.items() if name not in KINDS.values()}
        parts = [json.dumps(head, indent=1).removesuffix("}").rstrip()]
        for kind in KINDS.values():
            lines = [
                f"  {json.dumps(key)}: {json.dumps(entry, separators=(',', ':'))}"
                for key, entry in self.content[kind].items()
            ]
            parts.append(f' "{kind}": {{\n' + ",\n".join(lines) + ("\n }" if lines else " }"))
        write_atomically(self.file, ",\n".join(parts) + "\n}\n")

    def finish(self, entry: dict) -> None:
        entry["finished"], entry["date"] = True, datetime.now(UTC).isoformat(timespec="seconds")
        self.write()

    # what later tasks need of earlier ones

    def rows(self, training: Train) -> int:
        """Rows that a finished training has seen."""
        return self.content["trainings"][training.key]["rows"]

    def weights(self, training: Train) -> str:
        return f"{training.key}@{self.rows(training)}"

    def control(self, budget: int, seed: int, equal: str) -> str:
        """The control's weights at as many tokens as the meta-trained model has seen, or after as much time."""
        control = Train("control", budget, seed)
        seen_by = control if equal == "time" else Train("meta", budget, seed)
        return f"{control.key}@{self.rows(seen_by)}"

    def fit(self, weights: str, reads: str) -> dict[float, float]:
        """Mean loss beyond the window on the fit passages, by rate."""
        return {
            entry["rate"]: sum(beyond(values) for values in entry["values"]) / len(entry["values"])
            for entry in self.content["losses"].values()
            if (entry["weights"], entry["reads"], entry["text"], entry["finished"]) == (weights, reads, "fit", True)
        }


def beyond(by_chunk: list[float]) -> float:
    """Mean loss of a passage beyond the window."""
    return mean_loss(by_chunk, plan.WINDOW, None)


def mean_loss(by_chunk: list[float], start: int, stop: int | None) -> float:
    """Mean loss of the positions from `start` to `stop`, multiples of the chunk; the last chunk has one fewer."""
    counts = [plan.CHUNK] * (len(by_chunk) - 1) + [plan.CHUNK - 1]
    places = range(start // plan.CHUNK, len(by_chunk) if stop is None else stop // plan.CHUNK)
    return sum(by_chunk[place] * counts[place] for place in places) / sum(counts[place] for place in places)
