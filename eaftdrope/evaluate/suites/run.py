"""Measuring what an evaluation's plan says, one model after the other; what the cache has is not measured again, and every
step is stored before the next begins.

    eval.json    kind, settings, about, command, suites, notes, and for each model its scores
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from eaftdrope.errors import UserError
from eaftdrope.files import ResultFolder, cache_dir
from eaftdrope.loaded_model import evaluating

from .. import lm_eval as harness
from ..probes.agreement import AgreementProbe
from ..probes.build import run_probes
from ..score_cache import cached_scores, identity_of, score_key, writable_folder
from ..scores import Score
from .plan import EvaluatedModel, EvaluationOptions, EvaluationPlan, EvaluationStep

NAME = "eval.json"
SCHEMA = 1
Progress = Callable[[int, int], None]
Started = Callable[[EvaluatedModel, EvaluationStep], Progress]


def run_plan(
    plan: EvaluationPlan, results: ResultFolder, started: Started, *, fresh: bool = False
) -> dict[str, dict[str, list[Score]]]:
    """Scores by the models' names and the suites'.

    Args:
        results: opened for this plan; its document is made by the caller, and grows here.
        started: called before a step that is measured; what it returns is called with (done, total) in it.
        fresh: measure also what the cache has.

    Raises:
        UserError: a model cannot be loaded or measured, or the device has too little memory.
    """
    found: dict[str, dict[str, list[Score]]] = {}
    entries = results.document["models"] = [
        {"name": planned.name, "reference": planned.subject.reference, "scores": []} for planned in plan.models
    ]
    for planned, entry in zip(plan.models, entries):
        suites = found[planned.name] = {}
        model = _Model(planned, plan.options)
        for step, own in _measured(plan, planned, model, started, fresh):
            scores = [step.named(score) for score in own]
            suites.setdefault(step.suite, []).extend(scores)
            entry["scores"] += [asdict(score) for score in scores]
            results.save()
        # Before the next one is loaded: two may not fit.
        model.drop()
    return found


class _Model:
    """A model that is loaded when something is to be measured, and its fingerprint when that is asked for."""

    def __init__(self, planned: EvaluatedModel, options: EvaluationOptions):
        self.planned, self._options = planned, options
        self._loaded: Any = None
        self._identity: str | None = None

    @property
    def loaded(self):
        if self._loaded is None:
            self._loaded = self.planned.subject.load(self._options.dtype, self._options.device)
        return self._loaded

    @property
    def identity(self) -> str:
        if self._identity is None:
            self._identity = identity_of(self.planned.subject, self.planned.tokenizer)
        return self._identity

    def drop(self) -> None:
        self._loaded = None


def _measured(plan: EvaluationPlan, planned: EvaluatedModel, model: _Model, started: Started, fresh: bool):
    """(step, its scores) one after the other."""
    options = plan.options
    for step in planned.steps:
        probe = step.probe
        what: Any = probe
        if probe is None:
            what = ["lm-eval", step.name, plan.tasks.prints[step.name], options.limit, options.chat]
        elif isinstance(probe, AgreementProbe):
            file = _captured(plan, step, probe, model, started)
            if plan.is_base(planned):
                # its own scores are known: nothing is measured
                yield step, probe.capture(None, planned.tokenizer, file)
                continue
            what = [replace(probe, captured=None), file.name]
            probe.captured = file

        def measure(step: EvaluationStep = step) -> list[Score]:
            return _measure(plan, step, model, started(planned, step))

        yield step, cached_scores(score_key(model.identity, what, options.setting), measure, fresh=fresh)


def _measure(plan: EvaluationPlan, step: EvaluationStep, model: _Model, progress: Progress) -> list[Score]:
    options, tokenizer = plan.options, model.planned.tokenizer
    try:
        if step.probe is None:
            return _run_task(plan, step, model)
        return run_probes(
            model.loaded,
            tokenizer,
            [step.probe],
            batch_tokens=options.batch_tokens,
            progress=lambda name, done, total: progress(done, total),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({model.planned.name}, {step}). What was measured is kept: a lower --batch-tokens "
            f"({options.batch_tokens:,}) goes on."
        ) from error


def _run_task(plan: EvaluationPlan, step: EvaluationStep, model: _Model) -> list[Score]:
    options = plan.options
    try:
        found = harness.run_tasks(
            model.loaded,
            model.planned.tokenizer,
            [step.name],
            # few prompts have more tokens; lm-eval counts rows
            batch_size=max(1, options.batch_tokens // 256),
            limit=options.limit,
            manager=plan.tasks.manager,
            chat=options.chat,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a task's own code may raise anything
        raise UserError(harness.cannot_measure(step.name, error)) from error
    return harness.harness_scores(found, step.name)


def _captured(
    plan: EvaluationPlan, step: EvaluationStep, probe: AgreementProbe, model: _Model, started: Started
) -> Path:
    """The file with what the base model says; it is asked now, if it never was."""
    base = model if plan.is_base(model.planned) else _Model(plan.base, plan.options)
    key = score_key(base.identity, ["capture", replace(probe, captured=None, limit=None)], plan.options.setting)
    file = cache_dir() / "captures" / f"{key}.safetensors"
    if not file.is_file():
        writable_folder(file.parent)
        if base is not model:
            model.drop()
        progress = started(plan.base, replace(step, name=f"{step.name}, what the base model says"))
        loaded = base.loaded
        with evaluating(loaded):
            probe.capture(loaded, plan.base.tokenizer, file, batch_tokens=plan.options.batch_tokens, progress=progress)
    return file
