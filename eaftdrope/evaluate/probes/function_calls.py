"""Function calls by generation: held-out prompts are answered greedily, and the calls compared with the expected ones.

Scores: the share of rows whose calls are all exact (names and arguments, in any order), and the share with the right
functions whatever the arguments.

The rules are those of the checker of the Berkeley leaderboard (BFCL):

- calls may come in any order, none too many, none too few; names are compared exactly;
- an argument must equal one of its accepted values; "" among them means that it may be left out;
- strings are compared in lower case without spaces and , . / - _ * ^, and with ' read as ";
- 5 equals 5.0, but a boolean never equals a number; lists keep their order; a dict has a list of accepted values per key.

They are looser than BFCL's because the functions' schemas are not used: types come from the values (BFCL refuses 5.0 for an
integer), and only the accepted values decide if an argument may be left out. An argument with no accepted value at all must
be left out (BFCL accepts no answer to its two rows that have one).

This matcher is used even if bfcl-eval is installed, so that a score does not depend on the environment: bfcl-eval pins an
old numpy, and its checker cannot be imported without the clients of every vendor. The tests compare the two on BFCL's own
examples, right answers and spoilt ones: of 34,694 verdicts 60 differ, in 22 of 2,327 rows. In 20 of these BFCL refuses
its own reference, whose accepted values contradict the schema; the others are its greedy pairing of calls, and upper case
in a list inside a dict.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.data import Example, parse_tool_calls, render_prompt
from eaftdrope.errors import DataError, UserError

from ..generation import generate
from ..scores import Score, score_units
from ..texts import evenly_spaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..likelihood import Progress
    from .base import HeldOut

Accepted = dict[str, dict[str, list[Any]]]
"""One required call: {function: {argument: [accepted value, ...]}}, the form of BFCL's `ground_truth`."""


@dataclass(frozen=True)
class CallTask:
    """The turns before the answer, the tools on offer, and the expected calls (in any order)."""

    messages: list[dict]
    tools: list[dict] | None
    accepted: list[Accepted]


@dataclass(frozen=True)
class FunctionCallsProbe:
    """Shares of `tasks` with exact calls and with the right functions."""

    tasks: list[CallTask]
    max_new_tokens: int
    group: str = "target"
    name: str = "function_calls"

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> FunctionCallsProbe:
        """Build the probe; options: `limit` and `max_new_tokens`. It uses the held-out rows whose answer has calls."""
        tasks = [_call_task(example) for example in held_out.examples or [] if _has_calls(example)]
        if not tasks:
            raise UserError(
                f"the probe {name} needs held-out rows whose last answer calls a function (`tool_calls`), and none were "
                "found. Set `data.held_out` to such rows, or leave the probe out."
            )
        return cls(evenly_spaced(tasks, options["limit"]), options["max_new_tokens"], group)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        prompts = [render_prompt(task.messages, task.tools, tokenizer) for task in self.tasks]
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            # Generation keeps the logits of one position per row, so more tokens fit than in a likelihood.
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


def _has_calls(example: Example) -> bool:
    answers = [message for message in example.messages or [] if message["role"] == "assistant"]
    return bool(answers) and bool(answers[-1].get("tool_calls"))


def _call_task(example: Example) -> CallTask:
    accepted = accepted_calls(example.expected_calls)
    if example.ground_truth is not None:
        accepted = example.ground_truth
        check_accepted(accepted, example.origin)
    return CallTask(example.prompt_messages, example.tools, accepted)


def accepted_calls(calls: list[dict]) -> list[Accepted]:
    """Return reference calls `{"name", "arguments"}` in the accepted form, with the reference's value for each argument."""
    return [{call["name"]: {key: [_accepted(value)] for key, value in call["arguments"].items()}} for call in calls]


def check_accepted(accepted: Any, origin: str) -> None:
    """Check that `accepted` is a list of {function: {argument: [accepted value, ...]}}.

    Raises:
        DataError: it is not.
    """
    well_formed = isinstance(accepted, list) and all(
        isinstance(call, dict)
        and len(call) == 1
        and all(isinstance(arguments, dict) for arguments in call.values())
        and all(isinstance(values, list) for arguments in call.values() for values in arguments.values())
        for call in accepted
    )
    if not well_formed:
        raise DataError(
            f"{origin}: `ground_truth` is not a list of {{function: {{argument: [accepted value, ...]}}}}, one function"
            " each. Correct it, or remove it: the calls of the answer are then the expected ones."
        )


def calls_match(calls: list[dict] | None, accepted: list[Accepted]) -> bool:
    """Return True if `calls` ({"name", "arguments"} each) satisfy the accepted calls one to one, in any order."""
    if calls is None or len(calls) != len(accepted):
        return False
    if not accepted:
        return True
    first, rest = accepted[0], accepted[1:]
    return any(
        _call_matches(call, first) and calls_match(calls[:i] + calls[i + 1 :], rest) for i, call in enumerate(calls)
    )


def functions_match(calls: list[dict] | None, accepted: list[Accepted]) -> bool:
    """Return True if the right functions are called, each as often as expected, whatever the arguments."""
    names = Counter(name for call in accepted for name in call)
    return calls is not None and Counter(call["name"] for call in calls) == names


def _call_matches(call: dict, accepted: Accepted) -> bool:
    ((name, arguments),) = accepted.items()
    return call["name"] == name and _dict_matches(call["arguments"], arguments)


def _dict_matches(given: Any, accepted: dict[str, Any]) -> bool:
    if not isinstance(given, dict) or not given.keys() <= accepted.keys():
        return False
    for key, values in accepted.items():
        values = _alternatives(values)
        if key in given:
            if not any(_matches(given[key], value) for value in values):
                return False
        elif values and "" not in values:
            return False
    return True


def _alternatives(values: Any) -> list:
    # BFCL writes a dict inside a dict with plain values: such a value stands for itself.
    return values if isinstance(values, list) else [values]


def _matches(given: Any, accepted: Any) -> bool:
    if isinstance(accepted, dict):
        return _dict_matches(given, accepted)
    if isinstance(accepted, list):
        same_length = isinstance(given, list) and len(given) == len(accepted)
        return same_length and all(map(_matches, given, accepted))
    if isinstance(accepted, str):
        return isinstance(given, str) and _standard(given) == _standard(accepted)
    return isinstance(given, bool) == isinstance(accepted, bool) and given == accepted


def _standard(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _accepted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [_accepted(inner)] for key, inner in value.items()}
    if isinstance(value, list):
        return [_accepted(inner) for inner in value]
    return value
