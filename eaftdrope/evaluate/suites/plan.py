"""The plan of `eaftdrope eval`: models and the steps of each; every mistake is found before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError, raise_problems
from eaftdrope.models import refuse_ttt, short_name

from .. import lm_eval as harness
from ..probes.agreement import AgreementProbe
from ..probes.answers import prompt_ids
from ..probes.call_refusal import CallRefusalProbe
from ..probes.turn_consistency import TurnConsistencyProbe
from ..scores import Score
from .catalogue import LM_EVAL, Part, Selection, build_part, find_data, parse_suites
from .subject import Subject, find_subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..probes.base import Probe

RecipeProbes = Callable[["PreTrainedTokenizerBase"], "list[Probe]"]


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `eaftdrope eval`.

    Attributes:
        suite, data: as `parse_suites` and `find_data` read them.
        recipe: name of a recipe whose probes are measured too.
        base: the model that agreement compares with; the first of several models if not set.
        device, dtype: torch's names.
    """

    models: tuple[str, ...]
    suite: str | None = "general"
    data: tuple[str, ...] = ()
    recipe: str | None = None
    base: str | None = None
    limit: int | None = None
    include: Path | None = None
    chat: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    batch_tokens: int = 2048

    @property
    def setting(self) -> str:
        """The device type and dtype of the computation."""
        return f"{self.device.split(':')[0]} {self.dtype}"


@dataclass(frozen=True)
class EvaluationStep:
    """One probe of a model, or one task of lm-eval (then `probe` is None).

    `suffix` distinguishes its scores from those of the same probe in another suite.
    """

    suite: str
    name: str
    probe: Probe | None = None
    suffix: str = ""

    def named(self, score: Score) -> Score:
        """Return a score with the suffix in its metric."""
        return replace(score, metric=f"{score.metric} ({self.suffix})") if self.suffix else score

    def __str__(self) -> str:
        return f"{self.suite}: {self.name}"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its steps; `name` is its name in tables."""

    subject: Subject
    name: str
    tokenizer: PreTrainedTokenizerBase
    steps: tuple[EvaluationStep, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked evaluation.

    Attributes:
        base: the model that agreement compares with: one of the models or another.
        data: the origin of each part's rows.
        settings: what determines the results, as JSON.
        notes: remarks for the reader of the results.
    """

    options: EvaluationOptions
    models: tuple[EvaluatedModel, ...]
    base: EvaluatedModel | None
    tasks: harness.HarnessTasks | None
    data: dict[str, str]
    settings: dict
    notes: tuple[str, ...]

    @property
    def suites(self) -> list[str]:
        """Names of the suites, in order."""
        return list(dict.fromkeys(step.suite for model in self.models for step in model.steps))

    @property
    def to_measure(self) -> list[tuple[EvaluatedModel, EvaluationStep]]:
        """Every step that may be in the cache; the base model's own agreement is not measured."""
        steps = [(model, step) for model in self.models for step in model.steps]
        return [pair for pair in steps if not (isinstance(pair[1].probe, AgreementProbe) and self.is_base(pair[0]))]

    def is_base(self, model: EvaluatedModel) -> bool:
        """Return True for the model that agreement compares with."""
        return self.base is not None and model.subject == self.base.subject


def make_plan(
    options: EvaluationOptions, problems: Sequence[str] = (), recipe_probes: RecipeProbes | None = None
) -> EvaluationPlan:
    """Check everything that can be checked without weights, and read all data.

    Args:
        problems: those that the caller has found; reported with the rest.
        recipe_probes: the probes of `options.recipe`, for a model's tokenizer.

    Raises:
        UserError: with every problem that was found.
    """
    problems = list(problems)
    wanted, files = _read_names(options, problems)
    subjects = _find_subjects(options, problems)
    if wanted.tasks and (absent := harness.missing(f"{LM_EVAL}:{','.join(wanted.tasks)}")):
        problems.append(absent)
    if options.include is not None and not options.include.is_dir():
        problems.append(f"--include-path {options.include}: no such folder.")
    raise_problems(problems)

    steps = _steps(wanted, files, options, problems)
    tasks = None
    if wanted.tasks:
        try:
            tasks = harness.find_tasks(wanted.tasks, include=options.include)
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems)
    return _plan(options, subjects, steps, tasks, wanted, files, recipe_probes)


def _read_names(options: EvaluationOptions, problems: list[str]) -> tuple[Selection, dict[str, Path]]:
    try:
        wanted = parse_suites(options.suite) if options.suite is not None else Selection()
        return wanted, find_data(options.data, wanted)
    except UserError as error:
        problems.append(str(error))
        return Selection(), {}


def _find_subjects(options: EvaluationOptions, problems: list[str]) -> dict[str, Subject]:
    """Return the subjects by reference, the base model included."""
    if len(set(options.models)) < len(options.models):
        problems.append("a model is given twice. Pass each once.")
    found = {}
    for reference in dict.fromkeys((*options.models, *filter(None, [options.base]))):
        try:
            refuse_ttt(reference)
            found[reference] = find_subject(reference)
        except UserError as error:
            problems.append(str(error))
    return found


def _steps(
    wanted: Selection, files: dict[str, Path], options: EvaluationOptions, problems: list[str]
) -> list[EvaluationStep]:
    """Return the steps that are the same for every model."""
    steps = []
    for suite, parts in wanted.parts.items():
        for part in parts:
            try:
                probe = build_part(suite, part, files.get(part.name), options.limit)
                steps.append(EvaluationStep(suite, part.name, probe, "" if suite == "general" else part.name))
            except UserError as error:
                problems.append(str(error))
    return [*steps, *(EvaluationStep(LM_EVAL, task) for task in wanted.tasks)]


def _plan(
    options: EvaluationOptions,
    subjects: dict[str, Subject],
    steps: list[EvaluationStep],
    tasks: harness.HarnessTasks | None,
    wanted: Selection,
    files: dict[str, Path],
    recipe_probes: RecipeProbes | None,
) -> EvaluationPlan:
    notes: list[str] = []
    tokenizers = {reference: subject.tokenizer() for reference, subject in subjects.items()}
    reference = options.base or (options.models[0] if len(options.models) > 1 else None)
    short = [short_name(model) for model in options.models]

    def planned(model: str, steps: list[EvaluationStep]) -> EvaluatedModel:
        name = short_name(model) if short.count(short_name(model)) <= 1 else model
        return EvaluatedModel(subjects[model], name, tokenizers[model], tuple(steps))

    models, problems = [], []
    for model in options.models:
        try:
            own = [*steps, *_recipe_steps(options, recipe_probes, tokenizers[model])]
        except UserError as error:
            problems.append(f"{model}: {error}")
            continue
        if options.chat and wanted.tasks and not tokenizers[model].chat_template:
            problems.append(f"--chat: {model} has no chat template. Leave --chat out, or choose a model that has one.")
        own = _without_agreement(model, reference, own, tokenizers, notes)
        own = _without_conversations(model, own, tokenizers[model], notes)
        if not own:
            problems.append(f"{model}: nothing is left to measure. {' '.join(notes)}")
        models.append(planned(model, own))
    raise_problems(problems)
    base = None if reference is None else planned(reference, [])
    data = {part.name: _origin(part, files.get(part.name)) for parts in wanted.parts.values() for part in parts}
    settings = {
        "models": [{"name": model.name, "reference": model.subject.reference} for model in models],
        "suite": options.suite,
        "data": data,
        "recipe": options.recipe,
        "base": reference,
        "limit": options.limit,
        "include": None if options.include is None else str(options.include),
        "chat": options.chat,
        "setting": options.setting,
    }
    return EvaluationPlan(options, tuple(models), base, tasks, data, settings, tuple(dict.fromkeys(notes)))


def _recipe_steps(
    options: EvaluationOptions, recipe_probes: RecipeProbes | None, tokenizer: PreTrainedTokenizerBase
) -> list[EvaluationStep]:
    if recipe_probes is None or options.recipe is None:
        return []
    suffix = "" if options.suite is None else options.recipe
    return [EvaluationStep(options.recipe, probe.name, probe, suffix) for probe in recipe_probes(tokenizer)]


def _without_agreement(
    model: str, base: str | None, steps: list[EvaluationStep], tokenizers: dict, notes: list[str]
) -> list[EvaluationStep]:
    """Return the steps without an agreement that cannot be measured, and note the reason."""
    kept = []
    for step in steps:
        if isinstance(step.probe, AgreementProbe) and base is None:
            notes.append("agreement is left out: it compares with a base model, which --base sets.")
        elif isinstance(step.probe, AgreementProbe) and not _same_prompts(
            step.probe, tokenizers[base], tokenizers[model]
        ):
            notes.append(
                f"{model}: agreement is left out: its tokenizer or chat template renders the prompts differently from that "
                f"of {base}, so their distributions are not over the same tokens."
            )
        else:
            kept.append(step)
    return kept


def _without_conversations(
    model: str, steps: list[EvaluationStep], tokenizer: PreTrainedTokenizerBase, notes: list[str]
) -> list[EvaluationStep]:
    """Return the steps that a model without a chat template can be measured by, and note the others."""
    if tokenizer.chat_template:
        return steps
    chatting = [step.probe.name for step in steps if isinstance(step.probe, TurnConsistencyProbe | CallRefusalProbe)]
    notes += [f"{model}: {name} is left out: it needs a chat template." for name in chatting]
    return [step for step in steps if step.probe is None or step.probe.name not in chatting]


def _same_prompts(probe: AgreementProbe, one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    if one.get_vocab() != other.get_vocab():
        return False
    return all(prompt_ids(example, one) == prompt_ids(example, other) for example in probe.prompts)


def _origin(part: Part, file: Path | None) -> str:
    if file is not None:
        return str(file)
    return "shipped" if part.source is None else str(part.source)
