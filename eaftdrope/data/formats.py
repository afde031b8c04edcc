"""Formats: from a row as it was written to an `Example`. A format is detected by its fields.

| format              | fields                                                                                        |
|---------------------|-----------------------------------------------------------------------------------------------|
| `messages`          | `messages` (or `conversations` of role/content): as OpenAI writes them                         |
| `sharegpt`          | `conversations` of from/value                                                                  |
| `alpaca`            | `instruction`, optional `input`, `output`, optionally `history`                                |
| `prompt_completion` | `prompt`, `completion`: two strings, or two lists of messages                                  |
| `text`              | `text`                                                                                        |

and those of published data sets, in `published.py`. Other columns, under these and similar names (`fields.py`):

| column                                 | use                                                                        |
|----------------------------------------|----------------------------------------------------------------------------|
| `system`, `system_prompt`              | the system turn; refused if the conversation begins with another one       |
| `tools`, `functions`                   | the tools, also from the system turn's own `tools`                         |
| `reasoning`, `thinking`, `cot`         | reasoning of the answer, where question and answer are columns             |
| `context`, `options`, `choices`        | part of the question, where `question` is a column                         |
| `images`, `audio`, `videos`, `<image>` | refused: only text is trained                                              |
| `weight` of a row                      | factor on its loss; 0: left out                                            |
| `train`, `loss_mask`, ... of a row     | refused, if the row is not to be trained                                   |
| any other                              | reported: `Example.fields_ignored`, the table of `eaftdrope preview`, and a |
|                                        | warning unless it only describes the row's origin (`id`, `source`, ...)    |

A row of strings (`text`, `prompt` and `completion`) has no place for system, tools or reasoning: they are refused there. The
rules for a message are in `messages.py`, those for a call in `tools.py`.

A field that is null counts as absent. `messages`, `conversations`, `tools` and `tool_calls` may be JSON strings (the only
way to keep them whole in CSV or Parquet).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eaftdrope.errors import DataError

from . import published
from .fields import MEDIA, REASONING, SYSTEM, TOOLS, Fields, from_json, is_empty, plain_name
from .messages import (
    content_text,
    read_messages,
    read_turns,
    refuse_empty,
    row_weight,
    spoken,
    string,
    with_system,
)
from .tools import read_tools, refuse_bare_calls

FORMATS = (
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
    "question_answer",
    "reasoning",
    "pubmedqa",
    "xlam",
    "glaive",
)
# In the order of detection.
_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "reasoning": ("question", "reasoning", "response"),
    "pubmedqa": ("question", "context", "final_decision", "long_answer"),
    "question_answer": ("question", "answer"),
    "xlam": ("query", "tools", "answers"),
    "glaive": ("system", "chat"),
}
_THOUGHT = re.compile(r"\A.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One training example; exactly one of `messages`, (`prompt`, `completion`) and `text` is set.

    Args:
        messages (`list[dict]`, *optional*): role, content (always a string) and, if given, tool_calls (each
            `{"type": "function", "function": {"name": str, "arguments": dict}}`, with `id` if it had one), name,
            tool_call_id, reasoning_content, and weight (of this turn in the loss; 0: context, never trained).
        tools (`list[dict]`, *optional*): `{"type": "function", "function": {"name": ..., ...}}` each.
        prompt (`str`, *optional*): text before the completion.
        completion (`str`, *optional*): text to train.
        text (`str`, *optional*): a document, trained whole.
        ground_truth (`list[dict]`, *optional*): accepted values of each argument, per call: `{name: {argument: [...]}}`.
        weight (`float`): of the row in the loss; 0: nothing of it is trained.
        origin (`str`): the row's file and line, for messages.
        fields_read (`tuple[str, ...]`): paths of the row's keys that were read, indices left out (`messages[].role`).
        fields_ignored (`tuple[str, ...]`): paths of the row's keys that were not read (`id`, `messages[].name`).
    """

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    ground_truth: list[dict[str, Any]] | None = None
    weight: float = 1.0
    origin: str = ""
    fields_read: tuple[str, ...] = ()
    fields_ignored: tuple[str, ...] = ()

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages before the last assistant turn: the prompt of a probe."""
        return (self.messages or [])[: self._last_assistant()]

    @property
    def answer(self) -> dict[str, Any]:
        """The last assistant message."""
        assert self.messages is not None
        return self.messages[self._last_assistant()]

    @property
    def expected_calls(self) -> list[dict[str, Any]]:
        """`{"name": str, "arguments": dict}` of each call of the last assistant turn."""
        return [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in self.answer.get("tool_calls", [])
        ]

    def _last_assistant(self) -> int:
        turns = [index for index, message in enumerate(self.messages or []) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{self.origin or 'the example'}: no assistant turn.")
        return turns[-1]


def detect_format(row: dict[str, Any]) -> str:
    """Return the format of `row` by its fields: one of `FORMATS` without "auto".

    Raises:
        DataError: no format fits; the text lists the fields found and those of each format.
    """
    found = _format_of(published.renamed(row))
    if found is not None:
        return found
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _NEEDED.items())
    raise DataError(
        f"no known format has the fields {', '.join(map(str, row)) or '(none)'}. Known formats: {known}. "
        "Rename the fields to one of these."
    )


def _format_of(fields: Fields) -> str | None:
    present = {name for name, value in fields.values.items() if value is not None}
    if "conversations" in present and _has_roles(from_json(fields.values["conversations"], "conversations")):
        return "messages"
    return next((name for name, needed in _NEEDED.items() if present.issuperset(needed)), None)


def normalise(row: dict[str, Any], format: str = "auto", *, reasoning: bool = True, origin: str = "") -> Example:
    """Return `row` as an `Example`; with `reasoning` false, without what the assistant thinks before it answers.

    Raises:
        DataError: with the reason, without `origin` (the caller adds it).
    """
    if format not in FORMATS:
        raise DataError(f"format {format!r} is not one of {', '.join(FORMATS)}.")
    fields = published.renamed(row)
    if format == "auto":
        format = _format_of(fields) or detect_format(row)
    elif not (format == "messages" and "conversations" in row):
        absent = [name for name in _NEEDED[format] if fields.values.get(name) is None]
        if absent:
            raise DataError(
                f"format {format} needs the field{'s' * (len(absent) > 1)} {' and '.join(absent)}; "
                f"the row has {', '.join(map(str, row)) or 'none'}. Use `format: auto`, or rename the fields."
            )
    try:
        return _normalise(fields, format, reasoning, origin)
    except RecursionError as error:
        raise DataError("the row is nested too deeply") from error


def _normalise(fields: Fields, format: str, reasoning: bool, origin: str) -> Example:
    _refuse_media(fields)
    weight = row_weight(fields)
    parts = _READERS[format](fields)
    if "messages" in parts:
        parts.setdefault("tools", read_tools(fields))
        refuse_bare_calls(fields, parts["tools"])
        if format != "glaive":  # its `system` announces the functions
            parts["messages"] = with_system(fields, parts["messages"])
        if not reasoning:
            parts["messages"] = _without_reasoning(parts["messages"])
    else:
        _refuse_chat_columns(fields, format)
    read, ignored = fields.paths()
    return Example(**parts, weight=weight, origin=origin, fields_read=read, fields_ignored=ignored)


# --- the formats ------------------------------------------------------------------------------------------------------


def _from_messages(row: Fields) -> dict[str, Any]:
    field = "messages" if row.values.get("messages") is not None else "conversations"
    messages = read_messages(row.get(field), row, field)
    if messages[-1]["role"] == "assistant":
        row.get("answer")  # the reference that a probe compares the last turn with
    return {"messages": messages, "ground_truth": _ground_truth(row)}


def _from_sharegpt(row: Fields) -> dict[str, Any]:
    return {"messages": read_turns(row.get("conversations"), row, "conversations")}


def _from_alpaca(row: Fields) -> dict[str, Any]:
    instruction = string(row.get("instruction"), row.place("instruction"))
    extra = string(row.get("input") or "", row.place("input"))
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        raise DataError(f"history must be a list of pairs of question and answer; it is a {type(history).__name__}")
    messages = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history[{index}] must be a pair of question and answer")
        for role, text in zip(("user", "assistant"), pair):
            messages.append(spoken(role, text, row, f"history[{index}]"))
    messages.append(spoken("user", f"{instruction}\n{extra}" if extra else instruction, row, "instruction"))
    messages.append(published.answer(row, "output"))
    return {"messages": messages}


def _from_prompt_completion(row: Fields) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError("completion is empty: there is nothing to train")
        return {"prompt": content_text(prompt, "user", row, "prompt"), "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError(
            "prompt and completion must both be strings or both be lists of messages; they are "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    # The prompt is not trained in this format, its assistant turns included.
    context = read_messages(prompt, row, "prompt")
    for index, message in enumerate(context):
        if message.get("weight"):
            raise DataError(f"prompt[{index}] is marked as trained, but nothing of the prompt is. Use `messages`")
    return {
        "messages": [{**message, "weight": 0} for message in context] + read_messages(completion, row, "completion")
    }


def _from_text(row: Fields) -> dict[str, Any]:
    text = string(row.get("text"), row.place("text"))
    if not text.strip():
        raise DataError("text is empty: there is nothing to train")
    return {"text": text}


_READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
    "question_answer": published.question_answer,
    "reasoning": published.reasoning,
    "pubmedqa": published.pubmedqa,
    "xlam": published.xlam,
    "glaive": published.glaive,
}


# --- rules for every format ---------------------------------------------------------------------------------------


def _refuse_media(row: Fields) -> None:
    for key, value in row.values.items():
        if value is not None and plain_name(str(key)) in MEDIA:
            if not is_empty(value):
                raise DataError(
                    f"{row.place(key)} is not read: only text is trained, so the row would be trained without what it is "
                    "about. Leave the row out, or the column if the text needs no picture"
                )
            row.get(key)


def _refuse_chat_columns(row: Fields, format: str) -> None:
    """Refuse a system turn, tools or reasoning beside strings and texts, which have no place for them."""
    for key, value in row.among(SYSTEM | TOOLS | REASONING):
        if not is_empty(value):
            raise DataError(
                f"{row.place(key)} has no place in a row of strings (format {format}). Write it into the text, bring the "
                "row as messages, or leave the column out"
            )


def _without_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            message = {name: value for name, value in message.items() if name != "reasoning_content"}
            message["content"] = _THOUGHT.sub("", message["content"])
            refuse_empty(message, f"messages[{number}].content")
        kept.append(message)
    return kept


def _ground_truth(row: Fields) -> list[dict[str, Any]] | None:
    """Return accepted calls, also from a JSON string. Other data under this name is left alone."""
    value = row.values.get("ground_truth")
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = from_json(value, "ground_truth")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return None
    row.get("ground_truth")
    return value


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
