"""The quick audit: the positions of a row's values in its rendering, if each can only be in one place.

It needs no second rendering with marks, which `audit.py` makes for all other rows.

A text that occurs in the rendering once, and is not part of the template or the tools, has only that position. Calls are
found between the texts before and after them, as JSON or as one value after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

# A text of so many characters is not part of another by chance.
_CERTAIN = 16


@dataclass(frozen=True)
class Place:
    """The position of a value of message `message` (-1: a tool): characters [start, end) of the rendering."""

    message: int
    start: int
    end: int


def plainly_there(messages: Messages, tools: Tools, text: str, own_words: str) -> tuple[Place, ...] | None:
    """Return the positions of all values, in order, if they can be nowhere else; None if that is not certain."""
    if not _are_defined(tools or [], text):
        return None
    definitions = [_json(tool["function"]) for tool in tools or ()]
    spots: list[tuple[int, int] | None] = []
    reached = 0
    for message in messages:
        core = message["content"].strip()
        if message.get("reasoning_content") or "</think>" in core or (message.get("tool_calls") and core):
            return None
        start = text.find(core, reached)
        elsewhere = text.find(core) < start or text.find(core, start + 1) >= 0 or core in own_words
        if core and (len(core) < _CERTAIN or start < 0 or elsewhere or any(core in known for known in definitions)):
            return None
        reached = start + len(core) if core else reached
        spots.append((start, reached) if core else None)
    places = []
    for index, (message, spot) in enumerate(zip(messages, spots)):
        if spot:
            places.append(Place(index, *spot))
        elif message.get("tool_calls"):
            before = spots[index - 1] if index else (0, 0)
            behind = spots[index + 1] if index + 1 < len(messages) else (len(text), len(text))
            called = before and behind and _called_between(message["tool_calls"], text, before[1], behind[0], own_words)
            if not called:
                return None
            places.append(Place(index, *called))
    return tuple(places)


def _are_defined(tools: list[dict[str, Any]], text: str) -> bool:
    """Return whether each tool is written as JSON, or all are written one after the other.

    Then the name is followed by a description that occurs nowhere else.
    """
    if all(_json(tool["function"]) in text or json.dumps(tool, ensure_ascii=False, indent=4) in text for tool in tools):
        return True
    reached = 0
    for tool in tools:
        description = str(tool["function"].get("description") or "").strip()
        start = text.find(description, reached)
        if len(description) < _CERTAIN or text.count(description) != 1 or start < 0:
            return False
        if text.find(tool["function"]["name"], reached, start) < 0:
            return False
        reached = start + len(description)
    return True


def _called_between(
    calls: list[dict[str, Any]], text: str, begin: int, end: int, own_words: str
) -> tuple[int, int] | None:
    """Return the position of the calls in text[begin:end], which has no other value; None if it is not certain.

    Each call is its name, followed by its arguments as JSON or one after the other.
    """
    first = None
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        at = text.find(_json(name), begin, end)
        if at < 0 and name not in own_words:
            at = text.find(name, begin, end)
        if at < 0:
            return None
        as_json = _json(arguments)
        written = text.find(as_json, at + len(name), end)
        behind = written + len(as_json) if written >= 0 else _behind(arguments, text, at + len(name), end, own_words)
        if behind is None:
            return None
        first, begin = at if first is None else first, behind
    return None if first is None else (first, begin)


def _behind(arguments: Any, text: str, begin: int, end: int, own_words: str) -> int | None:
    """Return the end of the last of the arguments, which are in text[begin:end] one after the other.

    They are in the order of the row or of their keys. None if they are not, or if one may be a word of the template or a key.
    """
    for is_sorted in (False, True):
        keys: list[str] = []
        values = [*_leaves(arguments, keys, is_sorted)]
        reached: int | None = begin
        for value in values:
            is_text = isinstance(value, str)
            core = value.strip() if is_text else json.dumps(value)
            if not core or reached is None:
                continue
            if is_text and (core in own_words or any(core in key for key in keys)):
                return None
            at = text.find(core, reached, end)
            while at >= 0 and not is_text and _is_within_a_word(text, at, at + len(core)):
                at = text.find(core, at + 1, end)
            reached = at + len(core) if at >= 0 else None
        if reached is not None:
            return reached
    return None


def _is_within_a_word(text: str, start: int, end: int) -> bool:
    """Return whether a number or word at text[start:end] is part of a longer one."""
    before, behind = text[start - 1 : start], text[end : end + 2]
    return (
        before.isalnum() or before in ("_", ".") or behind[:1].isalnum() or (behind[:1] == "." and behind[1:].isdigit())
    )


def _leaves(value: Any, keys: list[str], is_sorted: bool) -> Iterator[Any]:
    """Yield the strings, numbers and booleans within `value`; the keys on the way are added to `keys`."""
    if isinstance(value, dict):
        keys += value
        for key in sorted(value, key=str.lower) if is_sorted else value:
            yield from _leaves(value[key], keys, is_sorted)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, keys, is_sorted)
    elif value is not None:
        yield value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
