"""Measuring an evaluation's plan, one model after the other.

Cached scores are not measured again, and every step is stored before the next begins.

    eval.json    kind, settings, about, command, suites, notes, and for each model its scores
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eaftdrope.errors import UserError
from eaftdrope.files import ResultFolder, cache_dir
from eaftdrope.loaded_model import evaluating

from .. import lm_eval as harness
from ..likelihood import Progress
from ..probes.agreement import AgreementProbe
from ..probes.build import run_probes
from ..score_cache import cached_scores, score_key, writable_folder
from ..scores import Score
from .plan import EvaluatedModel, EvaluationOptions, EvaluationPlan, EvaluationStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "eval.json"
SCHEMA = 1
Started = Callable[[EvaluatedModel, EvaluationStep], Progress]


def run_plan(
    plan: EvaluationPlan, results: ResultFolder, started: Started, *, fresh: bool = False
) -> dict[str, dict[str, list[Score]]]:
    """Return scores by the names of models and suites.

    Args:
        results: opened for this plan; the caller creates its document, which grows here.
        started: called before each step that is measured; returns the function that is called with (done, total).
        fresh: measure cached scores again.

    Raises:
        UserError: a model cannot be loaded or measured, or the device has too little memory.
    """
    found: dict[str, dict[str, list[Score]]] = {}
    assert results.document is not None, "the caller creates the document"
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
        # freed before the next one is loaded: two may not fit
        model.drop()
    return found


class _Model:
    """A model that is loaded on first use, and its identity, computed on first use."""

    def __init__(self, planned: EvaluatedModel, options: EvaluationOptions) -> None:
        self.planned, self._options = planned, options
        self._loaded: Any = None
        self._identity: str | None = None

    @property
    def loaded(self) -> PreTrainedModel:
        """The model in evaluation mode."""
        if self._loaded is None:
            self._loaded = self.planned.subject.load(self._options.dtype, self._options.device)
        return self._loaded

    @property
    def identity(self) -> str:
        """The identity of model and tokenizer for the cache."""
        if self._identity is None:
            self._identity = self.planned.subject.identity(self.planned.tokenizer)
        return self._identity

    def drop(self) -> None:
        """Free the weights."""
        self._loaded = None


def _measured(
    plan: EvaluationPlan, planned: EvaluatedModel, model: _Model, started: Started, fresh: bool
) -> Iterator[tuple[EvaluationStep, list[Score]]]:
    """Yield each step with its scores."""
    options = plan.options
    for step in planned.steps:
        probe = step.probe
        measured: Any = probe
        if probe is None:
            assert plan.tasks is not None, "a step without a probe is a task of lm-eval"
            measured = ["lm-eval", step.name, plan.tasks.fingerprints[step.name], options.limit, options.chat]
        elif isinstance(probe, AgreementProbe):
            file = _captured(plan, step, probe, model, started)
            if plan.is_base(planned):
                # its own scores need no measurement
                yield step, probe.own_scores(planned.tokenizer, file)
                continue
            measured = [replace(probe, captured=None), file.name]
            probe.captured = file

        def measure(step: EvaluationStep = step) -> list[Score]:
            return _measure(plan, step, model, started(planned, step))

        yield step, cached_scores(score_key(model.identity, measured, options.setting), measure, fresh=fresh)


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
            f"out of memory ({model.planned.name}, {step}). Scores measured so far are kept: pass a lower --batch-tokens "
            f"({options.batch_tokens:,}) to resume."
        ) from error


def _run_task(plan: EvaluationPlan, step: EvaluationStep, model: _Model) -> list[Score]:
    options = plan.options
    assert plan.tasks is not None, "a step without a probe is a task of lm-eval"
    try:
        found = harness.run_tasks(
            model.loaded,
            model.planned.tokenizer,
            [step.name],
            # lm-eval counts rows; few prompts have more than 256 tokens
            batch_size=max(1, options.batch_tokens // 256),
            limit=options.limit,
            manager=plan.tasks.manager,
            chat=options.chat,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a task's own code may raise any error
        raise UserError(harness.cannot_measure(step.name, error)) from error
    return harness.harness_scores(found, step.name)


def _captured(
    plan: EvaluationPlan, step: EvaluationStep, probe: AgreementProbe, model: _Model, started: Started
) -> Path:
    """Return the file with the base model's predictions; they are computed now if the file is missing."""
    assert plan.base is not None, "without a base model the plan has no agreement"
    base = model if plan.is_base(model.planned) else _Model(plan.base, plan.options)
    key = score_key(base.identity, ["capture", replace(probe, captured=None, limit=None)], plan.options.setting)
    file = cache_dir() / "captures" / f"{key}.safetensors"
    if not file.is_file():
        writable_folder(file.parent)
        if base is not model:
            model.drop()
        progress = started(plan.base, replace(step, name=f"{step.name}, the base model's answers"))
        loaded = base.loaded
        with evaluating(loaded):
            probe.capture(loaded, plan.base.tokenizer, file, batch_tokens=plan.options.batch_tokens, progress=progress)
    return file
