"""Rows of published data sets that have columns of their own, as messages and tools.

| format            | fields                                                          | such as                    |
|-------------------|-----------------------------------------------------------------|----------------------------|
| `reasoning`       | `question`, `reasoning`, `response`                             | medical-o1-reasoning-SFT   |
| `pubmedqa`        | `question`, `context.contexts`, `final_decision`, `long_answer` | PubMedQA                   |
| `question_answer` | `question`, `answer`                                            | GSM8K, MedQuAD             |
| `xlam`            | `query`, `tools`, `answers`: JSON strings                       | xlam-function-calling-60k  |
| `glaive`          | `system`, `chat`: a whole conversation in one string            | glaive-function-calling-v2 |

`RENAMED` has the names that some of them use instead.
"""

from __future__ import annotations

import json
import re
from typing import Any

from eaftdrope.errors import DataError

RENAMED = {
    "Question": "question",
    "Answer": "answer",
    "Complex_CoT": "reasoning",
    "Response": "response",
    "reasoning (reasoning_content)": "reasoning",
    "response (content)": "response",
}
# Python's names of types, as xLAM writes them, in JSON schema. Of a type that is not here nothing is claimed.
_SCHEMA_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}
_SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = re.compile(r"""\{\s*"name":\s*("[^"]*")\s*,\s*"arguments":\s*'(.*)'\s*\}$""", re.DOTALL)


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the names of this module, where they are free."""
    return {RENAMED[name] if RENAMED.get(name, name) not in row else name: value for name, value in row.items()}


def question_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    return _turns(_text(row, "question"), _text(row, "answer"))


def reasoning(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The reasoning apart from the answer: where it is written is the chat template's matter."""
    messages = _turns(_text(row, "question"), _text(row, "response"))
    messages[1]["reasoning_content"] = _text(row, "reasoning")
    return messages


def pubmedqa(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The label comes first in the answer, so that a few tokens of it can be scored."""
    context = row["context"]
    passages = context.get("contexts") if isinstance(context, dict) else context
    if isinstance(passages, str):
        passages = [passages]
    if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
        raise DataError("context must be a string, a list of strings, or an object with such a list as contexts")
    asked = f"Question: {_text(row, 'question')}\nAnswer yes, no or maybe, then explain."
    prompt = f"Context: {' '.join(passages)}\n\n{asked}" if passages else asked
    return _turns(prompt, f"{_text(row, 'final_decision')}. {_text(row, 'long_answer')}")


def xlam(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages, tools); `parameters`, a mapping of arguments there, becomes a JSON schema."""
    calls, tools = _json_list(row["answers"], "answers"), _json_list(row["tools"], "tools")
    messages = [
        {"role": "user", "content": _text(row, "query")},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    return messages, [{**tool, "parameters": _schema(tool.get("parameters") or {})} for tool in tools]


def glaive(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages, tools). A system text that only announces the functions is left to the chat template."""
    system = _text(row, "system").removeprefix("SYSTEM:").strip()
    tools = _objects(system)
    messages = [] if tools or not system else [{"role": "system", "content": system}]
    pieces = _SPEAKER.split(_text(row, "chat"))
    if len(pieces) < 3:
        raise DataError("chat has no USER: and ASSISTANT: turns")
    for number, (speaker, text) in enumerate(zip(pieces[1::2], pieces[2::2])):
        text = text.strip().removesuffix("<|endoftext|>").strip()
        message: dict[str, Any] = {"role": _GLAIVE_ROLES[speaker], "content": text}
        if speaker == "ASSISTANT" and "<functioncall>" in text:
            said, _, call = text.partition("<functioncall>")
            message |= {"content": said.strip(), "tool_calls": [_glaive_call(call.strip(), number)]}
        messages.append(message)
    return messages, tools


# --- pieces -----------------------------------------------------------------------------------------------------------


def _turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise DataError(f"{name} must be a string; it is a {type(row[name]).__name__}")
    return row[name]


def _json_list(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{name} is a string but not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{name} must be a list of objects, or a JSON string of one")
    return value


def _schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """xLAM's `{argument: {"type": "str, optional", "description": ..., "default": ...}}` as a JSON schema."""
    if not all(
        isinstance(argument, dict) and isinstance(argument.get("type"), str) for argument in parameters.values()
    ):
        return parameters
    properties, required = {}, []
    for name, argument in parameters.items():
        written = argument["type"]
        kind = _SCHEMA_TYPES.get(re.match(r"\w*", written)[0].lower())
        rest = {key: value for key, value in argument.items() if key != "type"}
        properties[name] = {"type": kind, **rest} if kind else rest
        if "default" not in argument and not written.endswith("optional"):
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects that stand one after the other from the first brace on."""
    decoder, found, position = json.JSONDecoder(), [], text.find("{")
    while position >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"system has a function that is not valid JSON: {error.msg}") from error
        found.append(value)
        position = text.find("{", position)
    return found


def _glaive_call(text: str, number: int) -> dict[str, Any]:
    """`{"name": "f", "arguments": '{"x": 1}'}`: JSON but for the single quotes."""
    quoted = _GLAIVE_CALL.match(text)
    try:
        if quoted is None:
            return json.loads(text)
        arguments = quoted[2].replace("\\'", "'")
        return {"name": json.loads(quoted[1]), "arguments": json.loads(arguments) if arguments.strip() else {}}
    except json.JSONDecodeError as error:
        raise DataError(f"chat, turn {number}: the <functioncall> is not valid JSON: {error.msg}") from error
