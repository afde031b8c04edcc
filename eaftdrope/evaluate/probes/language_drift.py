"""Answers in the script of the question: 13 questions in 8 languages, each with a script of its own.

The score is the share of an answer's letters whose script the question does not have, averaged over the questions. A script
is the first word of a letter's name in Unicode (LATIN, CYRILLIC, CJK, ...). Japanese writes with three: a question that has
kana allows all of them. A name in Latin letters in a Chinese answer counts, for the base model too: the change is what
matters.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scores import ENOUGH, Score, score_units
from ..texts import asset, evenly_spaced, json_lines
from .answers import answer, final_part, question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_SHIPPED = "language_prompts.jsonl"
_JAPANESE = frozenset({"HIRAGANA", "KATAKANA", "CJK"})
# words before the name of the script, and marks of length and repetition that several scripts share
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")
_SHARED = frozenset({"MODIFIER", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "FEMININE", "MASCULINE"})


@lru_cache(maxsize=4096)
def script_of(character: str) -> str | None:
    """Return the script of a letter; None for anything else."""
    if not unicodedata.category(character).startswith("L"):
        return None
    words = unicodedata.name(character, "").split()
    script = next((word for word in words if word not in _WIDTHS), None)
    return None if script in _SHARED else script


def foreign_share(prompt: str, text: str) -> float:
    """Return the share of the letters of `text` whose script `prompt` does not have; 0 without letters."""
    own = {script for script in map(script_of, prompt) if script}
    if own & (_JAPANESE - {"CJK"}):
        own |= _JAPANESE
    scripts = [script for script in map(script_of, text) if script]
    return sum(script not in own for script in scripts) / len(scripts) if scripts else 0.0


@dataclass(frozen=True)
class LanguageDriftProbe:
    """Mean share of other scripts in the answers to `prompts`."""

    prompts: list[str]
    max_new_tokens: int
    group: str = "general"
    name: str = "language_drift"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> LanguageDriftProbe:
        """Build the probe; options: `limit` and `max_new_tokens`."""
        prompts = [row["prompt"] for _, row in json_lines(asset(_SHIPPED), Path(_SHIPPED))]
        return cls(evenly_spaced(prompts, options["limit"]), options["max_new_tokens"], group)

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
        units = [
            (foreign_share(prompt, final_part(text)), 1.0) for prompt, text in zip(self.prompts, answers, strict=True)
        ]
        metric = "share of letters in another script"
        return [score_units(self.name, self.group, metric, units, kind="mean", better="lower", least=ENOUGH)]
