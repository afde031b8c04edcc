"""What `eaftdrope eval` will measure: models and the steps of each, with every mistake found before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .. import lm_eval as harness
from ..long_context.plan import raise_problems, short_name
from ..probes.agreement import AgreementProbe
from ..probes.answers import prompt_ids
from ..scores import Score
from .catalogue import LM_EVAL, Part, Selection, build_part, find_data, parse_suites
from .subject import Subject, find_subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..probes.build import Probe

RecipeProbes = Callable[["PreTrainedTokenizerBase"], "list[Probe]"]


@dataclass(frozen=True)
class EvaluationOptions:
    """What was asked for. `suite` and `data` as suites.py reads them; `recipe` is the name of the recipe whose probes are
    measured too; `device` and `dtype` are what torch calls them."""

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
        """What the numbers are computed in."""
        return f"{self.device.split(':')[0]} {self.dtype}"


@dataclass(frozen=True)
class EvaluationStep:
    """One probe of a model, or one task of lm-eval (then `probe` is None). `suffix` tells its scores from those that the same
    probe has elsewhere."""

    suite: str
    name: str
    probe: Probe | None = None
    suffix: str = ""

    def named(self, score: Score) -> Score:
        return replace(score, metric=f"{score.metric} ({self.suffix})") if self.suffix else score

    def __str__(self) -> str:
        return f"{self.suite}: {self.name}"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its steps; `name` is what tables call it."""

    subject: Subject
    name: str
    tokenizer: PreTrainedTokenizerBase
    steps: tuple[EvaluationStep, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """`base` is what agreement compares with: one of the models or another. `settings` is what decides the results, as JSON;
    `notes` is what their reader must know; `data` is where the rows of each part come from."""

    options: EvaluationOptions
    models: tuple[EvaluatedModel, ...]
    base: EvaluatedModel | None
    tasks: harness.HarnessTasks | None
    data: dict[str, str]
    settings: dict
    notes: tuple[str, ...]

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(step.suite for model in self.models for step in model.steps))

    @property
    def to_measure(self) -> list[tuple[EvaluatedModel, EvaluationStep]]:
        """Every step that the cache may have; of the base model, agreement is known."""
        steps = [(model, step) for model in self.models for step in model.steps]
        return [pair for pair in steps if not (isinstance(pair[1].probe, AgreementProbe) and self.is_base(pair[0]))]

    def is_base(self, model: EvaluatedModel) -> bool:
        return self.base is not None and model.subject == self.base.subject


def make_plan(
    options: EvaluationOptions, problems: Sequence[str] = (), recipe_probes: RecipeProbes | None = None
) -> EvaluationPlan:
    """Check everything that can be checked without weights, and read all data.

    Args:
        problems: what the caller has found wrong already; told with the rest.
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
        problems.append(f"--include-path {options.include}: there is no such folder.")
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
    """By reference; the base model too, where it is none of the models."""
    if len(set(options.models)) < len(options.models):
        problems.append("a model is named twice. Name each once.")
    found = {}
    for reference in dict.fromkeys((*options.models, *filter(None, [options.base]))):
        try:
            found[reference] = find_subject(reference)
        except UserError as error:
            problems.append(str(error))
    return found


def _steps(
    wanted: Selection, files: dict[str, Path], options: EvaluationOptions, problems: list[str]
) -> list[EvaluationStep]:
    """The steps that are the same for every model."""
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
            problems.append(f"--chat: {model} has no chat template. Leave --chat out, or name a model that has one.")
        own = _without_agreement(model, reference, own, tokenizers, notes)
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


def _recipe_steps(options: EvaluationOptions, recipe_probes: RecipeProbes | None, tokenizer) -> list[EvaluationStep]:
    if recipe_probes is None:
        return []
    suffix = "" if options.suite is None else options.recipe
    return [EvaluationStep(options.recipe, probe.name, probe, suffix) for probe in recipe_probes(tokenizer)]


def _without_agreement(
    model: str, base: str | None, steps: list[EvaluationStep], tokenizers: dict, notes: list[str]
) -> list[EvaluationStep]:
    """The steps, less an agreement that cannot be measured; the notes say why."""
    kept = []
    for step in steps:
        if isinstance(step.probe, AgreementProbe) and base is None:
            notes.append("agreement is left out: it compares with a base model, which --base names.")
        elif isinstance(step.probe, AgreementProbe) and not _reads_alike(
            step.probe, tokenizers[base], tokenizers[model]
        ):
            notes.append(
                f"{model}: agreement is left out: its tokenizer or chat template writes the prompts otherwise than that of "
                f"{base}, so their distributions are not over the same tokens."
            )
        else:
            kept.append(step)
    return kept


def _reads_alike(probe: AgreementProbe, one, other) -> bool:
    if one.get_vocab() != other.get_vocab():
        return False
    return all(prompt_ids(example, one) == prompt_ids(example, other) for example in probe.prompts)


def _origin(part: Part, file: Path | None) -> str:
    if file is not None:
        return str(file)
    return "shipped" if part.source is None else str(part.source)
