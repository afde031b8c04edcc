r"""Answers by generation: held-out or general prompts are answered greedily and compared with their references.

    numeric_answers   the last number, or the one after "####"
    exact_answers     the whole answer, normalised
    yes_no_maybe      the first of these words

Numbers, as the graders of GSM8K read them:

- the number after the last "####", else the one in the last \boxed{...}, else the last number of the text;
- "1,234" is 1234, "$3.50" is 3.5, "18 %" is 18, "-5" is minus five but "8-5" ends in five; a full stop that ends a sentence
  is no part of a number;
- "3/4", "\frac{3}{4}" and "1 1/2" are fractions with their value; two numbers are the same if their values are equal.

Exact answers are compared as SQuAD does: in lower case, without punctuation, without a, an and the, one space between words.

Yes, no or maybe is the first of these words in the answer, in any case.

For a reasoning model only the text after the last `</think>` counts; an answer whose thinking never ends is empty.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eaftdrope.data import Example, encode_prompt, normalise
from eaftdrope.errors import DataError, UserError

from ..generation import generate_ids
from ..likelihood import bos_prefix
from ..scores import Score, score_units
from ..texts import evenly_spaced, json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

LABELS = ("yes", "no", "maybe")
_LABEL = re.compile(rf"\b({'|'.join(LABELS)})\b", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
# A sign is one only where nothing stands before it that could be subtracted from; a currency may stand on either side of it.
_NUMBER = re.compile(
    rf"(?:(?<![\w).])(?P<sign>-)\s?)?[$€£]?(?P<minus>(?<=[$€£])-)?"
    rf"(?:(?P<whole>{_DIGITS})\s+(?=\d+/\d))?"
    rf"(?:(?P<numerator>{_DIGITS})\s?/\s?(?P<denominator>\d+)(?![\d/])|(?P<plain>{_DIGITS}(?:\.\d+)?|\.\d+))"
)
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def final_part(answer: str) -> str:
    """Return the answer without the reasoning before it; "" if the reasoning did not end."""
    _, ended, tail = answer.rpartition("</think>")
    if ended:
        return tail
    return "" if "<think>" in answer else answer


def final_number(answer: str) -> Fraction | None:
    """Return the number that an answer ends with; None if it has no number."""
    text = final_part(answer).replace("−", "-")
    if "####" in text:
        return _first_number(text.rpartition("####")[2])
    boxed = _BOXED.findall(text)
    numbers = _numbers(boxed[-1] if boxed else text)
    return numbers[-1] if numbers else None


def normalised(answer: str) -> str:
    """Return an answer in the form in which exact answers are compared."""
    text = final_part(answer).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def first_label(answer: str) -> str | None:
    """Return the first of yes, no and maybe, in lower case; None if the answer has none."""
    """ "yes", "no" or "maybe", whichever comes first; None where none does."""
    found = _LABEL.search(final_part(answer))
    return found[1].lower() if found else None


def _first_number(text: str) -> Fraction | None:
    numbers = _numbers(text)
    return numbers[0] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    values = (_value(match) for match in _NUMBER.finditer(_FRAC.sub(r"\1/\2", text)))
    return [value for value in values if value is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > 100:
        # a model that repeats digits without end, not a number
        return None
    parts = {name: part and part.replace(",", "") for name, part in match.groupdict().items()}
    if parts["plain"] is not None:
        value = Fraction(parts["plain"])
    elif int(parts["denominator"]) == 0:
        return None
    else:
        value = Fraction(int(parts["numerator"]), int(parts["denominator"])) + int(parts["whole"] or 0)
    return -value if parts["sign"] or parts["minus"] else value


class Reading(NamedTuple):
    """A rule for comparing answers: two agree if `parse` returns the same for both, neither None nor ""."""

    metric: str
    parse: Callable[[str], object]
    expected: str


READINGS = {
    "numeric_answers": Reading("right numbers", final_number, "a number"),
    "exact_answers": Reading("exact answers", normalised, "an answer"),
    "yes_no_maybe": Reading("yes, no or maybe", first_label, "yes, no or maybe"),
}
# Fields that make a row more than a single question: the data package reads such rows.
_MORE_THAN_A_QUESTION = ("messages", "completion", "context", "reasoning")


@dataclass(frozen=True)
class AnswerTask:
    """A row whose last turn (or completion) is left to the model, and the right text."""

    example: Example
    reference: str


@dataclass(frozen=True)
class AnswersProbe:
    """Share of right answers; `name` is a key of `READINGS`."""

    name: str
    tasks: list[AnswerTask]
    max_new_tokens: int
    group: str = "target"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> AnswersProbe:
        """Build the probe; options: `file` (JSONL that `read_tasks` reads; None: the held-out rows), `limit` and
        `max_new_tokens`."""
        file = options["file"]
        tasks = held_out_tasks(name, held_out.examples or []) if file is None else read_tasks(name, Path(file))
        if not tasks:
            raise UserError(
                f"the probe {name} needs held-out rows whose last answer has {READINGS[name].expected}, and none were "
                "found. Set `data.held_out` to such rows, give the probe a `file`, or leave it out."
            )
        return cls(name, evenly_spaced(tasks, options["limit"]), options["max_new_tokens"], group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        reading = READINGS[self.name]
        answers = answer(
            model,
            tokenizer,
            [task.example for task in self.tasks],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        references = [reading.parse(task.reference) for task in self.tasks]
        units = [(float(reading.parse(text) == right), 1.0) for text, right in zip(answers, references)]
        return [score_units(self.name, self.group, reading.metric, units, kind="share", better="higher")]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[str]:
    """Return the model's greedy answer to each example, without special tokens and outer white space."""
    ids = generate_ids(
        model,
        tokenizer,
        [prompt_ids(example, tokenizer) for example in examples],
        max_new_tokens=max_new_tokens,
        # Generation keeps the logits of one position per row, so more tokens fit than in a likelihood.
        batch_tokens=4 * batch_tokens,
        progress=progress,
    )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a prompt. Without a chat template, a single question has the form of multiple choice:
    "Question: ...\\nAnswer:".

    Raises:
        DataError: a conversation, and the tokenizer has no chat template.
    """
    turns = example.prompt_messages if example.messages else []
    if tokenizer.chat_template or [turn["role"] for turn in turns] != ["user"]:
        return encode_prompt(example, tokenizer)
    text = f"Question: {turns[0]['content']}\nAnswer:"
    return bos_prefix(tokenizer) + tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def question(text: str, answer: str = "", *, origin: str = "") -> Example:
    """Return a single question as a row."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return Example(messages=turns, origin=origin)


def held_out_tasks(name: str, examples: list[Example]) -> list[AnswerTask]:
    """Return the held-out rows whose answer this probe can read; yes, no or maybe must be the answer's first word."""
    tasks = [AnswerTask(example, text) for example in examples if (text := _answer_of(example))]
    if name == "yes_no_maybe":
        return [task for task in tasks if normalised(task.reference).partition(" ")[0] in LABELS]
    return [task for task in tasks if READINGS[name].parse(task.reference) not in (None, "")]


def read_tasks(name: str, file: Path) -> list[AnswerTask]:
    """Read the rows of a JSONL file: `question` (or `prompt`) and `answer`; or rows as for training, whose last answer is the
    reference unless they have an `answer` too.

    Raises:
        DataError: a row of another form, or a reference that this probe cannot read.
    """
    tasks = []
    for place, row in json_lines(file.read_text(encoding="utf-8"), file):
        example = read_example(row, place)
        reference = row.get("answer", _answer_of(example))
        # a number may be written as one
        text = reference if isinstance(reference, str) else str(reference)
        if isinstance(reference, bool) or READINGS[name].parse(text) in (None, ""):
            raise DataError(
                f"{place}: the reference lacks {READINGS[name].expected}, which {name} compares with. A row is "
                "{question, answer}, or {messages} whose last turn is the reference (or `answer`, if the row has it)."
            )
        tasks.append(AnswerTask(example, text))
    if not tasks:
        raise DataError(f"{file}: no rows. A line is {{question, answer}} or {{messages}}.")
    return tasks


def read_example(row: dict, place: str) -> Example:
    """Return a row of a probe's file as a prompt.

    Raises:
        DataError: the row has no prompt.
    """
    text = row.get("question", row.get("prompt"))
    if isinstance(text, str) and row.keys().isdisjoint(_MORE_THAN_A_QUESTION):
        return question(text, origin=place)
    example = normalise(row, origin=place)
    if example.text is not None:
        raise DataError(f"{place}: a text is not a prompt. A row needs `question`, `prompt` or `messages`.")
    if example.messages and example.messages[-1]["role"] != "assistant":
        # what a row without a reference lacks: the turn that is left to the model
        example = replace(example, messages=[*example.messages, {"role": "assistant", "content": ""}])
    return example


def _answer_of(example: Example) -> str:
    """Return the text of the last answer; "" if there is no answer."""
    if not example.messages:
        return example.completion or ""
    roles = [message["role"] for message in example.messages]
    return example.answer["content"] if "assistant" in roles else ""
