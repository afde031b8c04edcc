"""Instructions whose keeping a program can verify (after IFEval, Zhou et al., arXiv 2311.07911): short prompts that ask for a
form (so many words, bullets, lower case, JSON, ...), answered greedily.

Scores: the share of prompts with every constraint kept, and the share of all constraints that are kept. The prompts are our
own and few, so the scores are not IFEval's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaftdrope.evaluate.answering import answer, question
from eaftdrope.evaluate.answers import final_part
from eaftdrope.evaluate.constraints import CHECKS
from eaftdrope.evaluate.sampling import evenly
from eaftdrope.evaluate.scores import Score, score_units
from eaftdrope.evaluate.texts import asset, json_lines

SHIPPED = "instructions.jsonl"


@dataclass(frozen=True)
class Instruction:
    """`checks`: the name of one of `CHECKS` and the values it takes."""

    prompt: str
    checks: tuple[tuple[str, tuple[Any, ...]], ...]

    def kept(self, text: str) -> list[bool]:
        text = final_part(text).strip()
        return [CHECKS[name](text, *values) for name, values in self.checks]


@dataclass(frozen=True)
class Instructions:
    instructions: list[Instruction]
    max_new_tokens: int = 160
    group: str = "general"
    name: str = "instructions"

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
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
    """At most `limit` of the instructions that come with us."""
    rows = [row for _, row in json_lines(asset(SHIPPED), Path(SHIPPED))]
    return [
        Instruction(row["prompt"], tuple((name, tuple(values)) for name, *values in row["checks"]))
        for row in evenly(rows, limit)
    ]
