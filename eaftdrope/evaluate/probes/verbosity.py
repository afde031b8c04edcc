"""Length of answers to everyday requests, as the logarithm of one more than their characters.

Two models answer the same prompts, so the change is the mean logarithm of the ratio of their lengths: +0.69 is twice as long.
Longer is called worse, as the growth of answers is what this measures; that an answer is empty is counted separately.
An answer ends at `max_new_tokens`, so growth beyond it does not show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scores import ENOUGH, Score, score_units
from ..texts import asset, evenly_spaced, json_lines
from .answers import answer, final_part, question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

# of agreement, and of multiple choice without its choices
_PROMPTS, _QUESTIONS = "general_prompts.jsonl", "general_questions.jsonl"


@dataclass(frozen=True)
class VerbosityProbe:
    """Mean log length of the answers to `prompts`, and the share of empty ones."""

    prompts: list[str]
    max_new_tokens: int
    group: str = "general"
    name: str = "verbosity"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> VerbosityProbe:
        """Build the probe; options: `limit` and `max_new_tokens`."""
        prompts = [row["prompt"] for _, row in json_lines(asset(_PROMPTS), Path(_PROMPTS))]
        questions = [row["question"] for _, row in json_lines(asset(_QUESTIONS), Path(_QUESTIONS))]
        chosen = evenly_spaced([*prompts, *(text for text in questions if text.endswith("?"))], options["limit"])
        return cls(chosen, options["max_new_tokens"], group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        answers = answer(
            model,
            tokenizer,
            [question(prompt) for prompt in self.prompts],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        lengths = [len(final_part(text).strip()) for text in answers]
        logs = [(math.log1p(length), 1.0) for length in lengths]
        empty = [(float(not length), 1.0) for length in lengths]
        return [
            score_units(self.name, self.group, "log answer length", logs, kind="mean", better="lower", least=ENOUGH),
            score_units(self.name, self.group, "empty answers", empty, kind="share", better="lower", least=ENOUGH),
        ]
