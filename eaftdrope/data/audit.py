"""The audit of a rendering: is every value of the row in it, and where?

The conversation is rendered once more with each value between two marks of its own: private-use characters, inside the white
space that templates trim. Whatever a template does with a value (moves it, trims it, writes it as JSON), its marks move with
it: the value is between them, and a value whose marks are gone was dropped, even if another turn has the same words. A
value is a message's text, its reasoning, a call's name, a string among its arguments, and a tool's name.

- Numbers and booleans cannot carry marks: they are searched for in the text of their turn.
- Most rows need no marks (`plain_places.py`).
- If the marks change what the template writes, values are counted instead: the text must have each as often as the row.
- Reasoning that is written only while its turn is the last one is left out by design: the model does not see it at
  inference either. It is counted (`Found.dropped`), not refused.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eaftdrope.errors import DataError, LostTextError

from .plain_places import Messages, Place, Tools, plainly_there
from .template import THOUGHT

_FIRST_MARK = 0xF0000
_MARK = re.compile("[\U000f0000-\U0010ffff]")
# A mark as written by JSON in ASCII and by Python's repr.
_ESCAPED_MARK = re.compile(r"\\u(db[89a-f][0-9a-f])\\u(d[c-f][0-9a-f]{2})|\\U(00(?:0f|10)[0-9a-f]{4})")
_SHOWN = 60


@dataclass(frozen=True)
class Value:
    """A value of a row: `kind` is content, reasoning, name, argument or tool; `message` is -1 for a tool."""

    path: str
    message: int
    kind: str
    text: str


@dataclass(frozen=True)
class Found:
    """The result of an audit.

    Args:
        places (`tuple[Place, ...]`, *optional*): of every value, in the text's order; None if marks cannot be used.
        dropped (`tuple[str, ...]`): paths of the reasoning of earlier turns that the template leaves out by design.
    """

    places: tuple[Place, ...] | None
    dropped: tuple[str, ...]


def audit(
    messages: Messages, tools: Tools, text: str, write: Callable[[Messages, Tools], str], own_words: str = ""
) -> Found:
    """Find the position of every value of the conversation in `text`, its rendering.

    Args:
        messages, tools (`Messages`, `Tools`): the conversation.
        text (`str`): its rendering.
        write (`Callable`): renders a conversation in the same way as `text`.
        own_words (`str`): the source of the template.

    Raises:
        LostTextError: a value is missing.
    """
    if (simple := plainly_there(messages, tools, text, own_words)) is not None:
        return Found(simple, ())
    marked = _Marked(messages, tools)
    spots, again = marked.find(text, write)
    if spots is None:
        missing = _missing_by_count(text, marked.values)
        places = None
    else:
        missing = [number for number in range(len(marked.values)) if number not in spots]
        places = tuple(
            sorted(
                (Place(marked.values[number].message, *spot) for number, spot in spots.items()), key=lambda p: p.start
            )
        )
    dropped = marked.left_out_later(missing, write, traced=spots is not None) if missing else set()
    lost = [marked.values[number] for number in missing if number not in dropped]
    lost += [value for value in marked.scalars if not lost and not _has_scalars(text, value, marked, places, spots)]
    if lost:
        raise LostTextError(_what_is_lost(lost, messages), tuple(value.path for value in lost))
    if spots is not None:
        _check_reasoning(marked.values, spots, again)
    return Found(places, tuple(marked.values[number].path for number in sorted(dropped)))


class _Marked:
    """A conversation with marks around its values; value n has the marks 2n and 2n + 1."""

    def __init__(self, messages: Messages, tools: Tools) -> None:
        self.values: list[Value] = []
        self.scalars: list[Value] = []
        self.tools = tools and [self._tool(tool, number) for number, tool in enumerate(tools)]
        self.messages = [self._message(message, index) for index, message in enumerate(messages)]

    def find(
        self, text: str, write: Callable[[Messages, Tools], str]
    ) -> tuple[dict[int, tuple[int, int]] | None, set[int]]:
        """Return the first position of each value that is in `text`, and those that occur again; None if marks fail."""
        if 2 * len(self.values) > 0x1FFFF or _MARK.search(text) or (_may_escape(text) and _ESCAPED_MARK.search(text)):
            return None, set()
        try:
            traced = _unescaped(write(self.messages, self.tools))
        except DataError:
            return None, set()
        spots: dict[int, tuple[int, int]] = {}
        again: set[int] = set()
        open_at: dict[int, int] = {}
        for count, mark in enumerate(_MARK.finditer(traced)):
            number, is_end = divmod(ord(mark[0]) - _FIRST_MARK, 2)
            if not is_end:
                open_at[number] = mark.start() - count
            elif number in spots:
                again.add(number)
            elif number in open_at:
                spots[number] = (open_at[number], mark.start() - count)
        return (spots, again) if _MARK.sub("", traced) == text else (None, set())

    def left_out_later(self, missing: list[int], write: Callable[[Messages, Tools], str], *, traced: bool) -> set[int]:
        """Return those of the missing values that are reasoning and are written while no other turn follows theirs."""
        left_out = set()
        written: dict[int, str] = {}
        for number in missing:
            value = self.values[number]
            if value.kind != "reasoning" or value.message == len(self.messages) - 1:
                continue
            if value.message not in written:
                try:
                    written[value.message] = _unescaped(write(self.messages[: value.message + 1], self.tools))
                except DataError:
                    written[value.message] = ""
            so_far = written[value.message]
            if chr(_FIRST_MARK + 2 * number + 1) in so_far or (not traced and value.text in _MARK.sub("", so_far)):
                left_out.add(number)
        return left_out

    def _tool(self, tool: dict[str, Any], number: int) -> dict[str, Any]:
        name = self._mark(tool["function"]["name"], f"tools[{number}].function.name", -1, "tool")
        return {**tool, "function": {**tool["function"], "name": name}}

    def _message(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        path = f"messages[{index}]"
        changed: dict[str, Any] = {}
        if message.get("reasoning_content"):
            reasoning = f"{path}.reasoning_content"
            changed["reasoning_content"] = self._mark(message["reasoning_content"], reasoning, index, "reasoning")
        inline = THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
        if inline:
            opened, thought, closed, answer = inline.groups()
            thought = self._mark(thought, f"{path}.content (<think>)", index, "reasoning")
            changed["content"] = opened + thought + closed + self._mark(answer, f"{path}.content", index, "content")
        else:
            changed["content"] = self._mark(message["content"], f"{path}.content", index, "content")
        if message.get("tool_calls"):
            changed["tool_calls"] = [
                self._call(call, f"{path}.tool_calls[{number}]", index)
                for number, call in enumerate(message["tool_calls"])
            ]
        return {**message, **changed}

    def _call(self, call: dict[str, Any], path: str, index: int) -> dict[str, Any]:
        function = call["function"]
        name = self._mark(function["name"], f"{path}.function.name", index, "name")
        arguments = self._argument(function["arguments"], f"{path}.function.arguments", index)
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _argument(self, value: Any, path: str, index: int) -> Any:
        if isinstance(value, dict):
            return {key: self._argument(item, f"{path}.{key}", index) for key, item in value.items()}
        if isinstance(value, list):
            return [self._argument(item, f"{path}[{number}]", index) for number, item in enumerate(value)]
        if isinstance(value, str):
            return self._mark(value, path, index, "argument")
        if value is not None:
            self.scalars.append(Value(path, index, "argument", json.dumps(value)))
        return value

    def _mark(self, text: str, path: str, index: int, kind: str) -> str:
        core = text.strip()
        if not core:
            return text
        mark = _FIRST_MARK + 2 * len(self.values)
        self.values.append(Value(path, index, kind, core))
        before, _, after = text.partition(core)
        return f"{before}{chr(mark)}{core}{chr(mark + 1)}{after}"


def _may_escape(text: str) -> bool:
    return "\\ud" in text or "\\U0" in text


def _unescaped(text: str) -> str:
    """Return `text` with escaped marks as marks."""
    if not _may_escape(text):
        return text

    def mark(found: re.Match[str]) -> str:
        high, low, whole = found.groups()
        if whole:
            return chr(int(whole, 16))
        return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00)

    return _ESCAPED_MARK.sub(mark, text)


# --- values that carry no marks ---------------------------------------------------------------------------------------


def _has_scalars(
    text: str,
    value: Value,
    marked: _Marked,
    places: tuple[Place, ...] | None,
    spots: dict[int, tuple[int, int]] | None,
) -> bool:
    """Return whether the text of the turn has this number or boolean as often as the turn's arguments."""
    if places is not None and spots is not None:
        called = next(
            n for n, other in enumerate(marked.values) if other.message == value.message and other.kind == "name"
        )
        at = spots[called][0]
        others = [place for place in places if place.message != value.message]
        begin = max((place.end for place in others if place.end <= at), default=0)
        end = min((place.start for place in others if place.start >= at), default=len(text))
        text = text[begin:end]
    wanted = sum(other.text == value.text and other.message == value.message for other in marked.scalars)
    forms = {value.text, value.text.capitalize(), value.text.removesuffix(".0")}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return sum(1 for _ in re.finditer(rf"(?<![\w.])(?:{pattern})(?!\w|\.\d)", text)) >= wanted


def _missing_by_count(text: str, values: list[Value]) -> list[int]:
    """Return the numbers of the values that `text` has less often than the row, by themselves or within another value."""
    missing: set[int] = set()
    total = Counter(value.text for value in values)
    for number in sorted(range(len(values)), key=lambda n: -len(values[n].text)):
        wanted = values[number].text
        kept = Counter(value.text for n, value in enumerate(values) if n not in missing)
        needed = sum(count * other.count(wanted) for other, count in kept.items()) if total[wanted] else 0
        if sum(text.count(form) for form in _forms(wanted)) < needed:
            missing.add(number)
    return sorted(missing)


def _forms(text: str) -> set[str]:
    """Return the ways in which templates write a string: as it is, escaped for JSON, for HTML or as Python does."""
    as_json = {json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)}
    return {text, *as_json, html.escape(text), html.escape(text, quote=False), repr(text)[1:-1]}


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _check_reasoning(values: list[Value], spots: dict[int, tuple[int, int]], again: set[int]) -> None:
    """Check that reasoning is written once, and before the calls of its turn: a model thinks before it acts.

    Raises:
        LostTextError: it is not.
    """
    called: dict[int, int] = {}
    for number, value in enumerate(values):
        if value.kind == "name" and value.message not in called:
            called[value.message] = spots[number][0]
    for number, value in enumerate(values):
        if value.kind == "reasoning" and number in spots:
            twice = number in again
            if twice or spots[number][0] > called.get(value.message, len(values) and spots[number][0]):
                what = "twice" if twice else "after the call that it leads to"
                raise LostTextError(
                    f"the chat template writes {value.path} {what}: {_shortened(value.text)}. Set another chat template, "
                    "or train without reasoning (`reasoning: false` of the source).",
                    (value.path,),
                )


def _what_is_lost(lost: list[Value], messages: Messages) -> str:
    first = lost[0]
    more = f" (and {len(lost) - 1} more: {', '.join(value.path for value in lost[1:4])})" if lost[1:] else ""
    cause, remedy = _cause(first, {} if first.message < 0 else messages[first.message])
    return f"{first.path} is not in the text that the chat template writes: {_shortened(first.text)}{more}. {cause} {remedy}"


def _cause(value: Value, message: dict[str, Any]) -> tuple[str, str]:
    """Return why a value is lost, and what to do about it."""
    calls = bool(message.get("tool_calls"))
    if value.kind == "tool":
        return (
            "The chat template leaves out the tools of this conversation.",
            "Set a chat template that writes them, or put their definitions into the system turn.",
        )
    if value.kind == "reasoning":
        turn = "a turn that calls a tool" if calls else "this turn"
        return (
            f"The chat template leaves out the reasoning of {turn}.",
            "Set a chat template that writes it, or train without reasoning (`reasoning: false` of the source).",
        )
    if value.kind == "content" and calls:
        return (
            "The chat template leaves out the text of a turn that also calls a tool.",
            "Give the text a turn of its own in front of the call, or set a chat template that writes both.",
        )
    if value.kind == "content":
        return (
            f"The chat template leaves out this {message['role']} turn.",
            "Put its text into a turn that the template writes, or set another chat template.",
        )
    if "tool_calls[0]" not in value.path:
        return (
            "It seems that the chat template writes only one call in a turn.",
            "Give each call a turn of its own, or set a chat template that writes all of them.",
        )
    return ("The chat template leaves out this part of the call.", "Set a chat template that writes calls whole.")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
