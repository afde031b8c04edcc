"""Instructions whose fulfilment a program can verify (after IFEval, Zhou et al., arXiv 2311.07911): short prompts that ask
for a form (so many words, bullets, lower case, JSON, ...), answered greedily.

Scores: the share of prompts with every constraint met, and the share of all constraints met. The prompts are our own and
few, so the scores are not IFEval's.

Each constraint is one small function of the answer and the values in its instruction; it checks the form, never the
content. A word is what stands between white space; sentences end in . ! or ? before white space or the end; paragraphs have
an empty line between them; a bullet is a line that begins with -, * or •.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..scores import Score, score_units
from ..texts import asset, evenly_spaced, json_lines
from .answers import answer, final_part, question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_SHIPPED = "instructions.jsonl"


@dataclass(frozen=True)
class Instruction:
    """A prompt with its constraints: the name of one of `CHECKS` and its values, each."""

    prompt: str
    checks: tuple[tuple[str, tuple[Any, ...]], ...]

    def kept(self, text: str) -> list[bool]:
        """Return for each constraint if an answer meets it."""
        text = final_part(text).strip()
        return [CHECKS[name](text, *values) for name, values in self.checks]


@dataclass(frozen=True)
class InstructionsProbe:
    """Shares of `instructions` and of their constraints that the model's answers meet."""

    instructions: list[Instruction]
    max_new_tokens: int
    group: str = "general"
    name: str = "instructions"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> InstructionsProbe:
        """Build the probe; options: `limit` and `max_new_tokens`."""
        return cls(shipped_instructions(options["limit"]), options["max_new_tokens"], group)

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
            [question(instruction.prompt) for instruction in self.instructions],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        kept = [instruction.kept(text) for instruction, text in zip(self.instructions, answers)]
        prompts = [(float(all(marks)), 1.0) for marks in kept]
        single = [(float(mark), 1.0) for marks in kept for mark in marks]
        return [
            score_units(self.name, self.group, "instructions kept", prompts, kind="share", better="higher"),
            score_units(self.name, self.group, "constraints kept", single, kind="share", better="higher"),
        ]


def shipped_instructions(limit: int | None) -> list[Instruction]:
    """Return at most `limit` of the instructions that eaftdrope ships (None: all)."""
    rows = [row for _, row in json_lines(asset(_SHIPPED), Path(_SHIPPED))]
    return [
        Instruction(row["prompt"], tuple((name, tuple(values)) for name, *values in row["checks"]))
        for row in evenly_spaced(rows, limit)
    ]


def words_at_least(text: str, count: int) -> bool:
    return len(text.split()) >= count


def words_at_most(text: str, count: int) -> bool:
    return 0 < len(text.split()) <= count


def sentences(text: str, count: int) -> bool:
    parts = re.split(r"(?<=[.!?])[\"'”)]*\s+", text.strip())
    return bool(text.strip()) and len(parts) == count


def paragraphs(text: str, count: int) -> bool:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == count


def lines(text: str, count: int) -> bool:
    """Check the number of lines that are not empty."""
    return len([line for line in text.splitlines() if line.strip()]) == count


def bullets(text: str, count: int) -> bool:
    return len(re.findall(r"^\s*[-*•]\s+\S", text, re.MULTILINE)) == count


def numbered(text: str, count: int) -> bool:
    """Check for a list numbered 1, 2, ... `count`."""
    found = re.findall(r"^\s*(\d+)[.)]\s+\S", text, re.MULTILINE)
    return found == [str(number) for number in range(1, count + 1)]


def lower_case(text: str) -> bool:
    return text == text.lower() and text != text.upper()


def upper_case(text: str) -> bool:
    return text == text.upper() and text != text.lower()


def contains(text: str, word: str) -> bool:
    """Check for a whole word, in any case."""
    return _times(text, word) > 0


def contains_times(text: str, word: str, count: int) -> bool:
    return _times(text, word) == count


def avoids(text: str, word: str) -> bool:
    return bool(text.strip()) and _times(text, word) == 0


def avoids_characters(text: str, characters: str) -> bool:
    return bool(text.strip()) and not any(character in text.lower() for character in characters.lower())


def begins_with(text: str, start: str) -> bool:
    return text.lstrip().startswith(start)


def ends_with(text: str, end: str) -> bool:
    return text.rstrip().endswith(end)


def quoted(text: str) -> bool:
    """Check that the whole answer is in double quotation marks."""
    inner = text.strip()
    return len(inner) > 2 and inner[0] in '"“' and inner[-1] in '"”'


def json_keys(text: str, keys: list[str]) -> bool:
    """Check for one JSON object with exactly these keys, with or without a fenced block around it."""
    found = _read_json(text)
    return isinstance(found, dict) and sorted(found) == sorted(keys)


def json_list(text: str, count: int) -> bool:
    """Check for one JSON list of `count` entries, with or without a fenced block around it."""
    found = _read_json(text)
    return isinstance(found, list) and len(found) == count


def separated(text: str, by: str, count: int) -> bool:
    """Check for `count` parts that are not empty, with `by` between them."""
    parts = [part.strip() for part in text.strip().split(by)]
    return len(parts) == count and all(parts)


def title(text: str) -> bool:
    """Check for a title in double angle brackets, such as <<my title>>."""
    return re.search(r"<<[^<>\n]*\S[^<>\n]*>>", text) is not None


CHECKS: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        words_at_least,
        words_at_most,
        sentences,
        paragraphs,
        lines,
        bullets,
        numbered,
        lower_case,
        upper_case,
        contains,
        contains_times,
        avoids,
        avoids_characters,
        begins_with,
        ends_with,
        quoted,
        json_keys,
        json_list,
        separated,
        title,
    )
}


def _times(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _read_json(text: str) -> object:
    """Return the JSON value that the whole text is, None if it is not JSON."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except ValueError:
        return None
