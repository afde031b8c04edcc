"""What a run did, by rule: the strategies of a turn from its code and its calls, and the one that characterises a run.

    strategies_of(turn, before)    every rule of `TURN_RULES` that holds
    strategy_of(conversation)      the first rule of `RUN_RULES` that holds

The rules read code, so they name what was written, not what it was meant for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .journal import Event
from .protocol import parse
from .turns import Conversation, Turn, conversation_tree

TURN_RULES = {
    "no code": "the reply has no block of code",
    "look": "a part of the context is sliced or indexed, or its length is used",
    "search": "re.search, findall, find, index, count or startswith is called, or a literal is sought with in",
    "split": "split, splitlines or a range over the length of the context",
    "sub-call": "one call of the sub-model",
    "batch": "several calls of the sub-model",
    "recursion": "a child with its own REPL",
    "error": "the code failed, or was stopped",
    "recovery": "code ran after a turn that failed",
    "finish": "the turn set the answer",
}
RUN_RULES = {
    "recursion": "a child with its own REPL",
    "map": "several calls of the sub-model",
    "one sub-call": "one call of the sub-model",
    "code only": "the code reads the context, and calls no sub-model",
    "without reading": "no code reads the context",
}
_LOOK = re.compile(r"\bcontext\s*\[|\blen\(\s*context\b|\bpeek\(|\bget_context_length\(")
_SEARCH = re.compile(
    r"\bre\.(?:search|match|fullmatch|findall|finditer)\(|\.(?:find|index|count|startswith)\(|\bsearch\(|[\"'] in \w"
)
_SPLIT = re.compile(r"\.split(?:lines)?\(|\brange\([^)\n]*\blen\(\s*context\b")
_CONTEXT = re.compile(r"\bcontext\b|\bpeek\(|\bsearch\(|\bget_context_length\(")


def strategies_of(turn: Turn, before: Turn | None = None, *, finished: bool = False) -> list[str]:
    """The strategies of a turn, in the order of `TURN_RULES`.

    Args:
        before: the turn before it.
        finished: it set the answer.
    """
    code = "\n".join(block.code for block in turn.blocks)
    calls = sum(len(block.calls) for block in turn.blocks)
    holds = {
        "no code": not turn.blocks,
        "look": _LOOK.search(code),
        "search": _SEARCH.search(code),
        "split": _SPLIT.search(code),
        "sub-call": calls == 1,
        "batch": calls > 1,
        "recursion": any(block.children for block in turn.blocks),
        "error": turn.error is not None,
        "recovery": before is not None and before.error is not None and turn.blocks and turn.error is None,
        "finish": finished,
    }
    return [name for name in TURN_RULES if holds[name]]


def tagged_turns(conversation: Conversation) -> list[tuple[Turn, list[str]]]:
    """The turns of a conversation with their strategies."""
    turns = conversation.turns
    return [
        (turn, strategies_of(turn, before, finished=conversation.answer is not None and turn is turns[-1]))
        for before, turn in zip([None, *turns], turns)
    ]


def strategy_of(conversation: Conversation) -> str:
    """The strategy that characterises a conversation, a key of `RUN_RULES`."""
    if any(True for _ in conversation.children):
        return "recursion"
    calls = conversation.sub_calls
    if calls:
        return "map" if calls > 1 else "one sub-call"
    code = "\n".join(block for turn in conversation.turns for block in parse(turn.reply).blocks)
    return "code only" if _CONTEXT.search(code) else "without reading"


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers.

    Args:
        name: of its journal, without the suffix.
        finished: None for a run that has not ended.
        sub_calls, tokens, seconds: of all models of the run; seconds are those of the models.
    """

    name: str
    query: str
    strategy: str
    finished: bool | None
    turns: int
    sub_calls: int
    tokens: int
    seconds: float


def summary_of(name: str, events: Sequence[Event]) -> RunSummary:
    """Summarise the events of a journal."""
    root = conversation_tree(events)
    calls = [event for event in events if event["event"] == "call"]
    return RunSummary(
        name,
        root.query,
        strategy_of(root),
        root.answer is not None if root.ended else None,
        len(root.turns),
        sum(event["prompt"] is not None for event in calls),
        sum(event["tokens_in"] + event["tokens_out"] for event in calls),
        sum(event["seconds"] for event in calls),
    )
