"""Formats that a prompt states to the letter: each of 12 formats with each of 10 requests, answered greedily.

The score is the share of answers that are in the stated format and nothing else: no greeting, no sentence before or after, no
block around it. Whether the content is right is not checked. `instructions` has softer forms, and several in one prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..scores import ENOUGH, Score, score_units
from ..texts import evenly_spaced
from .answers import answer, final_part, question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_KINDS = ("colours", "animals", "fruits", "countries", "rivers", "tools", "drinks", "sports", "vegetables", "trees")
REQUESTS = tuple(f"Name three {kind}." for kind in _KINDS)

# an item of a list: a letter first, and none of the characters that separate items
_ITEM = r"[^\W\d_][^\n,;|:<>\[\]{}`*]*"


def _whole(pattern: str) -> Callable[[str], bool]:
    """A check that a whole answer is `pattern`, in which I stands for an item."""
    compiled = re.compile(pattern.replace("I", _ITEM))
    return lambda text: compiled.fullmatch(text) is not None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, str) and v.strip() for v in values)


def _json_list(text: str) -> bool:
    return _are_texts(_json(text))


def _json_object(text: str) -> bool:
    found = _json(text)
    return isinstance(found, dict) and list(found) == ["first", "second", "third"] and _are_texts([*found.values()])


def _upper(text: str) -> bool:
    return text == text.upper() and _whole(r"I, I, I")(text)


FORMATS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "JSON list": ("Answer with a JSON list of three strings and nothing else.", _json_list),
    "JSON object": (
        'Answer with a JSON object with the keys "first", "second" and "third" in this order, and nothing else.',
        _json_object,
    ),
    "numbered": (
        "Answer with three lines that begin with 1. 2. and 3. and nothing else.",
        _whole(r"1\. I\n2\. I\n3\. I"),
    ),
    "dashes": (
        "Answer with three lines that begin with a dash and a space, and nothing else.",
        _whole(r"- I\n- I\n- I"),
    ),
    "lines": (
        "Answer with three lines, one name each, without numbers or dashes, and nothing else.",
        _whole(r"I\nI\nI"),
    ),
    "commas": ("Answer on one line, with commas between the names, and nothing else.", _whole(r"I, ?I, ?I")),
    "semicolons": ("Answer on one line, with semicolons between the names, and nothing else.", _whole(r"I; ?I; ?I")),
    "bars": ("Answer on one line in square brackets, in the form [a|b|c], and nothing else.", _whole(r"\[I\|I\|I\]")),
    "tags": (
        "Answer in the form <answer>a, b, c</answer> and nothing else.",
        _whole(r"<answer>I, ?I, ?I</answer>"),
    ),
    "upper case": ("Answer on one line in capital letters, with commas between the names, and nothing else.", _upper),
    "pairs": (
        "Answer with three lines in the form a: x, b: x and c: x, where x is the name, and nothing else.",
        _whole(r"a: I\nb: I\nc: I"),
    ),
    "fence": (
        "Answer with a block that begins with a line of three backticks, then has one name per line, and ends with a line of "
        "three backticks. Write nothing else.",
        _whole(r"```\nI\nI\nI\n```"),
    ),
}
"""Name -> what the prompt states, and the check of a stripped answer."""


@dataclass(frozen=True)
class FormatKeepingProbe:
    """Share of `tasks`, (request, name of a format) each, whose answer is in the format."""

    tasks: list[tuple[str, str]]
    max_new_tokens: int
    group: str = "general"
    name: str = "format_keeping"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> FormatKeepingProbe:
        """Build the probe; options: `limit` and `max_new_tokens`."""
        tasks = [(request, wanted) for request in REQUESTS for wanted in FORMATS]
        return cls(evenly_spaced(tasks, options["limit"]), options["max_new_tokens"], group)

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
            [question(f"{request} {FORMATS[wanted][0]}") for request, wanted in self.tasks],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        units = [
            (float(FORMATS[wanted][1](final_part(text).strip())), 1.0)
            for text, (_, wanted) in zip(answers, self.tasks, strict=True)
        ]
        return [score_units(self.name, self.group, "formats kept", units, kind="share", better="higher", least=ENOUGH)]
