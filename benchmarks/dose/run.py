"""Train and measure what is missing, for a limited time; a later call resumes where this one stopped, or was killed.

A training is stored when it is measured, and one that was killed starts again. The weights of the arms of a cell are kept
in the work folder until all of them are brought to the equal target loss.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from math import isnan
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from eaftdrope.files import replacing

from . import measures, plan
from .measures import TARGET
from .plan import ARMS, DoseCell
from .results import DoseResults
from .subjects import Subject
from .training import train

Report = Callable[[str], None]


class OutOfTime(Exception):
    """The time of this call has passed."""


def settings(cells: Iterable[DoseCell]) -> dict[str, Any]:
    """What determines the results of each model."""
    models = dict.fromkeys(cell.model for cell in cells)
    return {model: {**asdict(plan.TRAININGS[model]), **_about(model)} for model in models}


def _about(model: str) -> dict[str, Any]:
    if model == plan.SMOLLM2:
        from .selection import FILE

        return {"digest": sha256(FILE.read_bytes()).hexdigest()[:16]}
    hidden, blocks = plan.LLAMAS[model]
    return {"hidden": hidden, "blocks": blocks}


class Runner:
    """Runs cells until a deadline (`time.monotonic`).

    Args:
        work: folder of the weights that are still needed.
        subjects: name of a model -> its subject.
    """

    def __init__(
        self, results: DoseResults, work: Path, subjects: Callable[[str], Subject], deadline: float, report: Report
    ) -> None:
        self.results, self.work, self.deadline, self.report = results, work, deadline, report
        self.subject = cache(subjects)

    def run(self, cells: Iterable[DoseCell]) -> bool:
        """Return whether nothing is missing."""
        try:
            for cell in cells:
                if not self.results.done(cell):
                    self._cell(cell)
        except OutOfTime as stop:
            self.report(f"next: {stop}")
            return False
        return True

    def _cell(self, cell: DoseCell) -> None:
        base = self._base(cell)
        if self.results.cell(cell)["inspected"] is None:
            self._check_time(cell.key)
            subject = self.subject(cell.model)
            self.results.add_inspected(cell, measures.inspected(subject.load().eval(), subject.rows(cell)))
        for arm in cell.arms:
            if arm not in self.results.cell(cell)["arms"]:
                self._check_time(f"{cell.key}, {arm}")
                self._train(cell, arm)
        ends = {arm: self.results.scores(cell, arm)[TARGET] for arm in cell.arms}
        level, tolerance, left_out = measures.levels(base[TARGET], ends, cell.seed)
        for arm in cell.arms:
            if "matched" not in self.results.cell(cell)["arms"][arm]:
                self._check_time(f"{cell.key}, {arm} at equal target loss")
                self._match(cell, arm, level, tolerance, left_out.get(arm))
        shutil.rmtree(self.work / cell.folder, ignore_errors=True)

    def _base(self, cell: DoseCell) -> measures.Scores:
        found = self.results.base(cell.model)
        if found is None:
            self._check_time(f"{cell.model} before any training")
            subject = self.subject(cell.model)
            model = subject.load().eval()
            target = measures.target(model, subject.measured)
            self.results.add_base(cell.model, {TARGET: target, **measures.retention(model, subject.measured)})
        return self.results.base(cell.model)

    def _file(self, cell: DoseCell, arm: str) -> Path:
        return self.work / cell.folder / f"{arm.replace('/', '-').replace(' ', '-')}.safetensors"

    def _train(self, cell: DoseCell, arm: str) -> None:
        """Train an arm, keep its weights and store its scores."""
        started, subject = time.process_time(), self.subject(cell.model)
        weight = self.results.cell(cell)["arms"]["eaft"]["mean_gate"] if arm == "constant" else 1.0
        found = train(subject, subject.rows(cell), ARMS[arm], plan.TRAININGS[cell.model], seed=cell.seed, weight=weight)
        seconds = time.process_time() - started
        file = self._file(cell, arm)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as path:
            save_file(found.weights, path)
        if arm not in self.results.cell(cell)["arms"]:
            model = measures.line(subject, found.weights)(1.0)
            scores = {
                TARGET: measures.target(model, subject.measured),
                **measures.retention(model, subject.measured),
            }
            facts = {
                "mean_gate": round(found.mean_gate, 6),
                "losses": found.losses,
                "training_seconds": round(seconds, 1),
            }
            facts["cpu_seconds"] = round(time.process_time() - started, 1)
            self.results.add_trained(cell, arm, facts, scores)
            self.report(f"trained  {cell.key}, {arm}: {_figures(scores)}; {facts['cpu_seconds']:.0f} CPU s")

    def _match(self, cell: DoseCell, arm: str, level: float, tolerance: float, why: str | None) -> None:
        """Measure an arm at the common target loss, or store why it does not take part."""
        started = time.process_time()
        if why is None and isnan(level):
            why = "no other arm of its cell takes part"
        if why is not None:
            self.results.add_matched(cell, arm, {"share": None, "why": why}, {})
            return
        if not self._file(cell, arm).is_file():
            # lost with the work folder: the same training again
            self._train(cell, arm)
        subject, weights = self.subject(cell.model), load_file(self._file(cell, arm))
        base, end = self.results.base(cell.model)[TARGET], self.results.scores(cell, arm)[TARGET]
        share, scores = measures.matched(subject, weights, base, end, level, tolerance)
        entry = {"share": share, "cpu_seconds": round(time.process_time() - started, 1)}
        if share is None:
            entry["why"] = "does not reach the common loss between the base model and its trained weights"
        self.results.add_matched(cell, arm, entry, scores)
        self.report(f"matched  {cell.key}, {arm}: {_figures(scores)}; {entry['cpu_seconds']:.0f} CPU s")

    def _check_time(self, what: str) -> None:
        if time.monotonic() >= self.deadline:
            raise OutOfTime(what)


def _figures(scores: measures.Scores) -> str:
    return ", ".join(f"{name} {score.value:.3f}" for name, score in scores.items()) or "left out"


def subject_of(model: str, work: Path) -> Subject:
    """The subject of a model; a Llama is trained first, and kept in the work folder."""
    if model == plan.SMOLLM2:
        from .smollm2 import SmolLM2

        return SmolLM2().subject()
    from .llamas import llama_subject

    return llama_subject(model, work)
