"""Function calls where none fits: questions that no function on offer answers (BFCL's irrelevance rows, or a file).

Scores: the share of such questions that are answered without a call, and, as a control, the share of answerable questions
(the rows of `package:bfcl`'s split "test") that are answered with one: a model that never calls keeps the first and loses
the second. As for BFCL's checker, a call is one that can be parsed; here an answer that opens a call and does not finish it
is no refusal either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.data import Source, iter_rows, normalise, parse_tool_calls, render_prompt
from eaftdrope.data.bfcl import irrelevant_rows
from eaftdrope.errors import DataError, UserError

from ..generation import generate
from ..scores import ENOUGH, Score, score_units
from ..texts import evenly_spaced, json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

_OPEN_CALLS = ("<tool_call>", "<function=", "[TOOL_CALLS]", "<|tool_call")


@dataclass(frozen=True)
class OfferedTools:
    """A question, the tools on offer, and whether one of them answers it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    fits: bool


@dataclass(frozen=True)
class CallRefusalProbe:
    """Shares of the questions of `offers` that are rightly answered without and with a call."""

    offers: list[OfferedTools]
    max_new_tokens: int
    group: str = "general"
    name: str = "call_refusal"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> CallRefusalProbe:
        """Build the probe; options: `file` (JSONL of messages and tools that no call answers; None: BFCL's), `limit` (of each
        kind of question) and `max_new_tokens`."""
        try:
            refused = [_offer(row, place, fits=False) for place, row in _unanswerable(options["file"])]
            source = Source("package:bfcl", split="test")
            called = [] if options["file"] else [_offer(row.data, row.origin, fits=True) for row in iter_rows(source)]
        except DataError as error:
            raise UserError(f"the probe {name}: {error} Or set its `file`, or leave it out.") from error
        if not refused:
            raise UserError(f"the probe {name}: {options['file']} has no rows. A line is {{messages, tools}}.")
        limit = options["limit"]
        return cls([*evenly_spaced(refused, limit), *evenly_spaced(called, limit)], options["max_new_tokens"], group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        answers = generate(
            model,
            tokenizer,
            [render_prompt(offer.messages, offer.tools, tokenizer) for offer in self.offers],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=4 * batch_tokens,
            progress=progress,
        )
        scores = []
        for fits, metric in ((False, "no call where none fits"), (True, "a call where one fits")):
            right = [
                (float(is_call(text) if fits else not opens_call(text)), 1.0)
                for text, offer in zip(answers, self.offers, strict=True)
                if offer.fits is fits
            ]
            if right:
                options = {"kind": "share", "better": "higher", "least": ENOUGH}
                scores.append(score_units(self.name, self.group, metric, right, **options))
        return scores


def is_call(text: str) -> bool:
    """Return whether an answer is one or more calls that can be parsed."""
    return bool(parse_tool_calls(text))


def opens_call(text: str) -> bool:
    """Return whether an answer calls, or begins to."""
    return is_call(text) or any(mark in text for mark in _OPEN_CALLS)


def _unanswerable(file: str | None) -> list[tuple[str, dict[str, Any]]]:
    if file is not None:
        return list(json_lines(Path(file).read_text(encoding="utf-8"), Path(file)))
    return [(row["id"], row) for row in irrelevant_rows()]


def _offer(row: dict[str, Any], place: str, *, fits: bool) -> OfferedTools:
    example = normalise(row, "messages", origin=place)
    if not example.tools or not example.messages:
        raise DataError(f"{place}: a row needs `messages` and `tools`.")
    return OfferedTools(example.prompt_messages if fits else example.messages, example.tools, fits)
