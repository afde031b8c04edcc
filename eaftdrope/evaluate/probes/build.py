"""Making probes from a recipe's names, and running them on a model that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eaftdrope.errors import DataError, UserError
from eaftdrope.loaded_model import evaluating

from ..likelihood import TokenRow
from ..scores import Score
from ..texts import asset, evenly_spaced, json_lines, read_texts, shipped_text
from .agreement import AgreementProbe
from .answers import READINGS, AnswersProbe, held_out_tasks, question, read_example, read_tasks
from .function_calls import CallTask, FunctionCallsProbe, accepted_calls, check_accepted
from .held_out_loss import HeldOutLossProbe
from .instructions import InstructionsProbe, shipped_instructions
from .multiple_choice import MultipleChoiceProbe, Question
from .perplexity import PerplexityProbe

if TYPE_CHECKING:
    from datasets import Dataset

    from eaftdrope.data import Example

_QUESTIONS = "general_questions.jsonl"
_PROMPTS = "general_prompts.jsonl"
DEFAULTS: dict[str, dict[str, Any]] = {
    "held_out_loss": {"limit": None},
    # generation is slow
    "function_calls": {"limit": 32, "max_new_tokens": 96},
    "perplexity": {"files": None, "max_tokens": 4096},
    "multiple_choice": {"file": None, "limit": None},
    "numeric_answers": {"file": None, "limit": 64, "max_new_tokens": 256},
    "exact_answers": {"file": None, "limit": 64, "max_new_tokens": 32},
    "yes_no_maybe": {"file": None, "limit": 64, "max_new_tokens": 32},
    "instructions": {"limit": None, "max_new_tokens": 160},
    "agreement": {"file": None, "limit": None, "max_tokens": 1024, "max_new_tokens": 32},
}
"""Probe -> its options and their defaults, which are those of a recipe; a test compares the two."""

# those that never generate: cheap enough to be measured while training goes on
_LIKELIHOODS = (HeldOutLoss, Perplexity, MultipleChoice, AgreementProbe)


class Probe(Protocol):
    """Something that measures a model. `run` changes nothing in it and calls `progress(done, total)` as it goes."""

    name: str
    group: str

    def run(
        self, model, tokenizer, *, batch_tokens: int = 2048, progress: Callable[[int, int], None] | None = None
    ) -> list[Score]: ...


def run_probes(
    model,
    tokenizer,
    probes: list[Probe],
    *,
    batch_tokens: int = 2048,
    progress: Callable[[str, int, int], None] | None = None,
    capture: Path | None = None,
) -> list[Score]:
    """Run every probe in evaluation mode without gradients; the model is left in the mode it came in.

    Args:
        capture: the model is the base model, and what probes compare later models with is stored in this file, unless it
            is there already.
        batch_tokens: tokens of a batch, padding included; bounds the logits to `batch_tokens` x vocabulary.
        progress: called with (probe name, done, total) after each batch.
    """
    scores = []
    with evaluating(model):
        for probe in probes:
            report = None
            if progress is not None:

                def report(done: int, total: int, name: str = probe.name) -> None:
                    progress(name, done, total)

            if capture is not None and isinstance(probe, AgreementProbe):
                scores += probe.capture(model, tokenizer, capture, batch_tokens=batch_tokens, progress=report)
            else:
                scores += probe.run(model, tokenizer, batch_tokens=batch_tokens, progress=report)
    return scores


def cheap_probes(probes: list[Probe], limit: int) -> list[Probe]:
    """What can be measured now and then while training goes on: the probes that do not generate, on at most `limit` rows,
    windows, questions or prompts each. None of them draws a random number."""
    return [probe.subset(limit) for probe in probes if isinstance(probe, _LIKELIHOODS)]


def build_probes(
    wanted: list[tuple[str, str, dict]],
    *,
    held_out_examples: list[Example] | None = None,
    held_out_dataset: Dataset | None = None,
) -> list[Probe]:
    """Make the probes of `wanted`: (name, group, options) each, options by the names that the recipe has for them; those left
    out are `DEFAULTS`.

        held_out_loss     limit               rows of `held_out_dataset` (columns input_ids, labels)
        function_calls    limit, max_new_tokens     examples of `held_out_examples` whose answer calls functions
        perplexity        files, max_tokens   text or JSONL with "text"; None: the text shipped here
        multiple_choice   file, limit         JSONL of question, choices, answer; None: the questions shipped here
        numeric_answers, exact_answers, yes_no_maybe
                          file, limit, max_new_tokens     JSONL that `read_tasks` reads; None: `held_out_examples`
        instructions      limit, max_new_tokens
        agreement         file, limit, max_tokens, max_new_tokens     JSONL of prompts; None: those shipped here

    Raises:
        UserError: a probe needs held-out data that is not there, or its file cannot be used.
    """
    probes: list[Probe] = []
    for name, group, given in wanted:
        options = {**DEFAULTS.get(name, {}), **given}
        if name == "held_out_loss":
            probes.append(_held_out_loss(held_out_dataset, group, **options))
        elif name == "function_calls":
            probes.append(_function_calls(held_out_examples, group, **options))
        elif name == "perplexity":
            probes.append(_perplexity(group, **options))
        elif name == "multiple_choice":
            probes.append(_multiple_choice(group, **options))
        elif name in READINGS:
            probes.append(_answers(name, held_out_examples, group, **options))
        elif name == "instructions":
            probes.append(_instructions(group, **options))
        elif name == "agreement":
            probes.append(_agreement(group, **options))
        else:
            raise UserError(f"unknown probe {name!r}. Probes: {', '.join(DEFAULTS)}.")
    return probes


def _held_out_loss(dataset: Dataset | None, group: str, limit: int | None) -> HeldOutLossProbe:
    if dataset is None or len(dataset) == 0:
        raise UserError("the probe held_out_loss needs held-out rows, and there are none. Set `data.held_out`.")
    indices = evenly_spaced(range(len(dataset)), limit)
    rows = [TokenRow(list(dataset[i]["input_ids"]), list(dataset[i]["labels"])) for i in indices]
    return HeldOutLossProbe(rows, group)


def _function_calls(
    examples: list[Example] | None, group: str, limit: int | None, max_new_tokens: int
) -> FunctionCallsProbe:
    tasks = [_call_task(example) for example in examples or [] if _calls_function(example)]
    if not tasks:
        raise UserError(
            "the probe function_calls needs held-out rows whose last answer calls a function (`tool_calls`), and there "
            "are none. Set `data.held_out` to such rows, or leave the probe out."
        )
    return FunctionCallsProbe(evenly_spaced(tasks, limit), max_new_tokens, group)


def _calls_function(example: Example) -> bool:
    answers = [message for message in example.messages or [] if message["role"] == "assistant"]
    return bool(answers) and bool(answers[-1].get("tool_calls"))


def _call_task(example: Example) -> CallTask:
    accepted = accepted_calls(example.expected_calls)
    if example.ground_truth is not None:
        accepted = example.ground_truth
        check_accepted(accepted, example.origin)
    return CallTask(example.prompt_messages, example.tools, accepted)


def _perplexity(group: str, files: list[str] | None, max_tokens: int | None) -> PerplexityProbe:
    texts = (
        [shipped_text()]
        if files is None
        else [text for file in files for text in read_texts(Path(file), "the perplexity probe")]
    )
    return PerplexityProbe(texts, max_tokens, group=group)


def _multiple_choice(group: str, file: str | None, limit: int | None) -> MultipleChoiceProbe:
    where = Path(_QUESTIONS if file is None else file)
    text = asset(_QUESTIONS) if file is None else where.read_text(encoding="utf-8")
    questions = [_question(row, place) for place, row in json_lines(text, where)]
    if not questions:
        raise DataError(f"{where}: no questions. A line is {{question, choices, answer}}.")
    return MultipleChoiceProbe(evenly_spaced(questions, limit), group)


def _question(row: dict, place: str) -> Question:
    match row:
        case {"question": str(question), "choices": [_, _, *_] as choices, "answer": int(answer)} if all(
            isinstance(choice, str) and choice for choice in choices
        ) and 0 <= answer < len(choices):
            return Question(question, tuple(choices), answer)
    raise DataError(
        f"{place}: not a question. Expected `question` (text), `choices` (two or more texts) and `answer` "
        "(the index of the right choice, from 0)."
    )


def _answers(
    name: str,
    examples: list[Example] | None,
    group: str,
    file: str | None,
    limit: int | None,
    max_new_tokens: int,
) -> AnswersProbe:
    tasks = held_out_tasks(name, examples or []) if file is None else read_tasks(name, Path(file))
    if not tasks:
        raise UserError(
            f"the probe {name} needs held-out rows whose last answer has {READINGS[name].wanted}, and there are none. Set "
            "`data.held_out` to such rows, give the probe a `file`, or leave it out."
        )
    return AnswersProbe(name, evenly_spaced(tasks, limit), max_new_tokens, group)


def _instructions(group: str, limit: int | None, max_new_tokens: int) -> InstructionsProbe:
    return InstructionsProbe(shipped_instructions(limit), max_new_tokens, group)


def _agreement(group: str, file: str | None, limit: int | None, max_tokens: int, max_new_tokens: int) -> AgreementProbe:
    prompts = general_prompts() if file is None else read_prompts(Path(file))
    return AgreementProbe(evenly_spaced(prompts, limit), max_tokens, max_new_tokens, group=group)


def general_prompts() -> list[Example]:
    """The 48 everyday questions and requests that come with us."""
    return [question(row["prompt"]) for _, row in json_lines(asset(_PROMPTS), Path(_PROMPTS))]


def read_prompts(file: Path) -> list[Example]:
    """The prompts of a JSONL file: `prompt`, `question` or `messages` each.

    Raises:
        DataError: a row that asks nothing, or no row.
    """
    prompts = [read_example(row, place) for place, row in json_lines(file.read_text(encoding="utf-8"), file)]
    if not prompts:
        raise DataError(f"{file}: no prompts. A line is {{prompt}} or {{messages}}.")
    return prompts
