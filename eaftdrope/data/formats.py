"""From a row as it was written to an `Example`: formats, told apart by their fields.

| format              | fields                                                                                        |
|---------------------|-----------------------------------------------------------------------------------------------|
| `messages`          | `messages` (or `conversations` of role/content), optionally `tools`: as OpenAI writes them     |
| `sharegpt`          | `conversations` of from/value, optionally `system`, `tools`                                    |
| `alpaca`            | `instruction`, optional `input`, `output`, optionally `system`, `history`                      |
| `prompt_completion` | `prompt`, `completion`: two strings, or two lists of messages                                  |
| `text`              | `text`                                                                                        |

and those of published data sets, in `published.py`.

A field that is null counts as absent. `messages`, `conversations`, `tools` and `tool_calls` may be JSON strings (the only
way to keep them whole in CSV or Parquet).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eaftdrope.data import published
from eaftdrope.data.tools import normalise_call, normalise_tools
from eaftdrope.errors import DataError

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
# In the order in which they are looked for.
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
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# What a template may read beside role, content and tool_calls.
_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")
_THOUGHT = re.compile(r"\A.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One training example; exactly one of `messages`, (`prompt`, `completion`) and `text` is set.

    Args:
        messages (`list[dict]`, *optional*): role, content (always a string) and, where given, tool_calls (each
            `{"type": "function", "function": {"name": str, "arguments": dict}}`, with `id` if it had one), name,
            tool_call_id, reasoning_content, and weight (0: this turn is context and never trained).
        tools (`list[dict]`, *optional*): `{"type": "function", "function": {"name": ..., ...}}` each.
        prompt (`str`, *optional*): text before the completion.
        completion (`str`, *optional*): text to train.
        text (`str`, *optional*): a document, trained whole.
        ground_truth (`list[dict]`, *optional*): accepted values of each argument, per call: `{name: {argument: [...]}}`.
        origin (`str`): where the row came from, for messages.
        fields_read (`tuple[str, ...]`): paths of the row's keys that were read, indices left out (`messages[].role`).
        fields_ignored (`tuple[str, ...]`): paths of the row's keys that were not read (`id`, `messages[].name`).
    """

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    ground_truth: list[dict[str, Any]] | None = None
    origin: str = ""
    fields_read: tuple[str, ...] = ()
    fields_ignored: tuple[str, ...] = ()

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages before the last assistant turn: what a model is asked in a probe."""
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
            raise DataError(f"{self.origin or 'the example'}: there is no assistant turn to ask for.")
        return turns[-1]


def detect_format(row: dict[str, Any]) -> str:
    """The format of `row` by its fields: one of `FORMATS` without "auto".

    Raises:
        DataError: no format fits; the text names the fields found and those looked for.
    """
    present = {name for name, value in published.renamed(row).items() if value is not None}
    if "conversations" in present and _has_roles(_from_json(row["conversations"], "conversations")):
        return "messages"
    for name, needed in _NEEDED.items():
        if present.issuperset(needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _NEEDED.items())
    raise DataError(
        f"no known format has the fields {', '.join(map(str, row)) or '(none)'}. Looked for {known}. "
        "Rename the fields to one of these."
    )


def normalise(row: dict[str, Any], format: str = "auto", *, reasoning: bool = True, origin: str = "") -> Example:
    """`row` as an `Example`; with `reasoning` false, without what the assistant thinks before it answers.

    Raises:
        DataError: with the reason, without `origin` (the caller puts it in front).
    """
    if format not in FORMATS:
        raise DataError(f"format {format!r} is not one of {', '.join(FORMATS)}.")
    fields = published.renamed(row)
    if format == "auto":
        format = detect_format(row)
    elif not (format == "messages" and "conversations" in row):
        absent = [name for name in _NEEDED[format] if fields.get(name) is None]
        if absent:
            raise DataError(
                f"format {format} needs the field{'s' * (len(absent) > 1)} {' and '.join(absent)}; "
                f"the row has {', '.join(map(str, row)) or 'none'}. Use `format: auto`, or rename the fields."
            )
    example = {
        "messages": _from_messages,
        "sharegpt": _from_sharegpt,
        "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt_completion,
        "text": _from_text,
        "question_answer": _from_published(published.question_answer),
        "reasoning": _from_published(published.reasoning),
        "pubmedqa": _from_published(published.pubmedqa),
        "xlam": _from_published(published.xlam),
        "glaive": _from_published(published.glaive),
    }[format](fields, origin)
    return example if reasoning else _without_reasoning(example)


# --- the formats ------------------------------------------------------------------------------------------------------


def _from_messages(row: dict[str, Any], origin: str) -> Example:
    field = "messages" if row.get("messages") is not None else "conversations"
    return Example(
        messages=_messages(_from_json(row[field], field), field),
        tools=normalise_tools(row.get("tools")),
        ground_truth=_ground_truth(row.get("ground_truth")),
        origin=origin,
    )


def _from_sharegpt(row: dict[str, Any], origin: str) -> Example:
    turns = _from_json(row["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations must be a list of turns that is not empty")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(f"{where} must be an object with the fields from and value")
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise DataError(f"{where}.from is {turn['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
        message = {"role": role, "content": turn["value"]}
        if turn["from"] == "function_call":
            calls = _from_json(turn["value"], f"{where}.value")
            message = {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    return Example(
        messages=_messages(messages, "conversations"), tools=normalise_tools(row.get("tools")), origin=origin
    )


def _from_alpaca(row: dict[str, Any], origin: str) -> Example:
    instruction = _string(row["instruction"], "instruction")
    extra = _string(row.get("input") or "", "input")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for index, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history[{index}] must be a pair of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": row["output"]})
    return Example(messages=_messages(messages, "messages"), origin=origin)


def _from_prompt_completion(row: dict[str, Any], origin: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError("completion is empty: there is nothing to train")
        return Example(prompt=prompt, completion=completion, origin=origin)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError(
            "prompt and completion must both be strings or both be lists of messages; they are "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    # Nothing of the prompt is trained in this format, its assistant turns included.
    context = [{**message, "weight": 0} for message in _messages(prompt, "prompt")]
    answers = _messages(completion, "completion")
    return Example(messages=context + answers, tools=normalise_tools(row.get("tools")), origin=origin)


def _from_text(row: dict[str, Any], origin: str) -> Example:
    text = _string(row["text"], "text")
    if not text.strip():
        raise DataError("text is empty: there is nothing to train")
    return Example(text=text, origin=origin)


def _from_published(read: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], str], Example]:
    """`read` gives messages, or messages and tools."""

    def make(row: dict[str, Any], origin: str) -> Example:
        given = read(row)
        messages, tools = given if isinstance(given, tuple) else (given, None)
        return Example(messages=_messages(messages, "messages"), tools=normalise_tools(tools), origin=origin)

    return make


def _without_reasoning(example: Example) -> Example:
    if example.messages is None:
        return example
    messages = []
    for number, message in enumerate(example.messages):
        if message["role"] == "assistant":
            apart = {name: value for name, value in message.items() if name not in ("reasoning_content", "thinking")}
            answer = _THOUGHT.sub("", message["content"])
            message = _message({**apart, "content": answer}, f"messages[{number}]")
        messages.append(message)
    return replace(example, messages=messages)


# --- messages ---------------------------------------------------------------------------------------------------------


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{field} must be a list of messages that is not empty")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must be an object with the fields role and content")
    role = message["role"]
    if role not in _ROLES:
        raise DataError(f"{where}.role is {role!r}; known are {', '.join(_ROLES)}")
    calls = _from_json(message.get("tool_calls"), f"{where}.tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"{where}.tool_calls must be a list")
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls, but only an assistant message may call")
    content = _content(message.get("content"), role, f"{where}.content")
    if not content and not calls and role in ("assistant", "user"):
        kind = "null" if message.get("content") is None else "empty"
        also = " and there are no tool_calls" if role == "assistant" else ""
        raise DataError(f"{where}.content is {kind}{also}: the {role} message says nothing")
    clean = {"role": role, "content": content}
    if calls:
        clean["tool_calls"] = [normalise_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    clean |= {name: message[name] for name in _PASSED_ON if message.get(name) is not None}
    if message.get("weight") is not None:
        if message["weight"] not in (0, 1):
            raise DataError(f"{where}.weight is {message['weight']!r}; it must be 0 (not trained) or 1 (trained)")
        clean["weight"] = int(message["weight"])
    return clean


def _content(content: Any, role: str, where: str) -> str:
    """Content as one string: null is empty, text parts are joined, a tool's structured result becomes JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        other = sorted({str(part["type"]) for part in content} - {"text"})
        if other:
            raise DataError(f"{where} has parts of type {', '.join(other)}; only text is trained")
        return "".join(_string(part.get("text"), f"{where}[{n}].text") for n, part in enumerate(content))
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise DataError(f"{where} must be a string, null or a list of text parts; it is a {type(content).__name__}")


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string; it is a {type(value).__name__}")
    return value


def _ground_truth(value: Any) -> list[dict[str, Any]] | None:
    """Accepted calls, also from a JSON string. Other data sets keep other things under this name: those are left alone."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _from_json(value, "ground_truth")
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else None


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


def _from_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is a string but not valid JSON: {error.msg} at column {error.colno}") from error
