"""Multiple choice by likelihood: the answer is the choice that the model finds most probable after the question.

    plain accuracy        argmax over choices of      log p(" " + choice | prompt)
    normalised accuracy   argmax over choices of      log p(" " + choice | prompt) / number of characters of choice

as lm-eval's `acc` and `acc_norm`. The prompt is "Question: ...\\nAnswer:", the same for base and instruction models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..likelihood import IGNORED, TokenRow, bos_prefix, rows_nll
from ..scores import Score, score_units
from ..texts import evenly_spaced


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoiceProbe:
    questions: list[Question]
    group: str = "general"
    name: str = "multiple_choice"

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
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
        """The same probe on at most `limit` of its questions."""
        return replace(self, questions=evenly_spaced(self.questions, limit))


def choice_row(tokenizer, question: str, choice: str) -> TokenRow:
    """The tokens of prompt and choice, labelled on the choice. Tokenised as one text, so that words stay whole."""
    prompt = f"Question: {question}\nAnswer:"
    begin = bos_prefix(tokenizer)
    ids = begin + tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids
    start = len(begin) + len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return TokenRow(ids, [IGNORED] * start + ids[start:])
