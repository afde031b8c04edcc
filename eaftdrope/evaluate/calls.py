"""Function calls by generation: held-out prompts are answered greedily, and the calls compared with those asked for.

Scores: the share of rows whose calls are all exact (names and arguments, in any order), and the share with the right
functions whatever the arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from eaftdrope.evaluate.generation import generate
from eaftdrope.evaluate.matching import Accepted, calls_match, functions_match
from eaftdrope.evaluate.scores import Score, score_units


@dataclass(frozen=True)
class CallTask:
    """The turns before the answer, the tools on offer, and the calls that are right (any order)."""

    messages: list[dict]
    tools: list[dict] | None
    accepted: list[Accepted]


@dataclass(frozen=True)
class FunctionCalls:
    tasks: list[CallTask]
    max_new_tokens: int = 96
    group: str = "target"
    name: str = "function_calls"

    def run(self, model, tokenizer, *, batch_tokens: int = 2048, progress=None) -> list[Score]:
        from eaftdrope.data import parse_tool_calls, render_prompt

        prompts = [render_prompt(task.messages, task.tools, tokenizer) for task in self.tasks]
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            # Generation keeps the logits of one position a row, so it can hold more tokens than a likelihood.
            batch_tokens=4 * batch_tokens,
            progress=progress,
        )
        calls = [parse_tool_calls(answer) for answer in answers]
        exact = [(float(calls_match(c, task.accepted)), 1.0) for c, task in zip(calls, self.tasks)]
        right = [(float(functions_match(c, task.accepted)), 1.0) for c, task in zip(calls, self.tasks)]
        return [
            score_units(self.name, self.group, "exact calls", exact, kind="share", better="higher"),
            score_units(self.name, self.group, "right function", right, kind="share", better="higher"),
        ]
