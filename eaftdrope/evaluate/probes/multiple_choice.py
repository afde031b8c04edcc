"""Multiple choice by likelihood: the answer is the choice that the model finds most probable after the question.

    plain accuracy        argmax over choices of      log p(" " + choice | prompt)
    normalised accuracy   argmax over choices of      log p(" " + choice | prompt) / number of characters of choice

as lm-eval's `acc` and `acc_norm`. The prompt is "Question: ...\\nAnswer:", the same for base and instruction models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import DataError

from ..likelihood import IGNORED, TokenRow, bos_prefix, rows_nll
from ..scores import Score, score_units
from ..texts import asset, evenly_spaced, json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_SHIPPED = "general_questions.jsonl"


@dataclass(frozen=True)
class Question:
    """A question with its choices; `answer` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoiceProbe:
    """Accuracy on `questions`, normalised by length and plain."""

    questions: list[Question]
    group: str = "general"
    name: str = "multiple_choice"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> MultipleChoiceProbe:
        """Build the probe; options: `file` (JSONL of question, choices, answer; None: the shipped one) and `limit`."""
        return cls(evenly_spaced(_read_questions(options["file"]), options["limit"]), group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        rows = [choice_row(tokenizer, q.question, choice) for q in self.questions for choice in q.choices]
        nll = iter(rows_nll(model, rows, batch_tokens=batch_tokens, progress=progress))
        plain, normalised = [], []
        for q in self.questions:
            costs = [next(nll)[0] for _ in q.choices]
            by_length = [cost / len(choice) for cost, choice in zip(costs, q.choices)]
            plain.append((float(costs.index(min(costs)) == q.answer), 1.0))
            normalised.append((float(by_length.index(min(by_length)) == q.answer), 1.0))
        return [
            score_units(self.name, self.group, "multiple choice", normalised, kind="share", better="higher"),
            score_units(self.name, self.group, "multiple choice, plain", plain, kind="share", better="higher"),
        ]

    def subset(self, limit: int) -> MultipleChoiceProbe:
        return replace(self, questions=evenly_spaced(self.questions, limit))


def choice_row(tokenizer: PreTrainedTokenizerBase, question: str, choice: str) -> TokenRow:
    """Return the tokens of prompt and choice, labelled on the choice; tokenised as one text, so that words stay whole."""
    prompt = f"Question: {question}\nAnswer:"
    prefix = bos_prefix(tokenizer)
    ids = prefix + tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids
    start = len(prefix) + len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return TokenRow(ids, [IGNORED] * start + ids[start:])


def _read_questions(file: str | None) -> list[Question]:
    path = Path(_SHIPPED if file is None else file)
    text = asset(_SHIPPED) if file is None else path.read_text(encoding="utf-8")
    questions = [_question(row, place) for place, row in json_lines(text, path)]
    if not questions:
        raise DataError(f"{path}: no questions. A line is {{question, choices, answer}}.")
    return questions


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
