"""Rows of published data sets with columns of their own, as messages and tools.

| format            | fields                                                          | such as                    |
|-------------------|-----------------------------------------------------------------|----------------------------|
| `reasoning`       | `question`, `reasoning`, `response`                             | medical-o1-reasoning-SFT   |
| `pubmedqa`        | `question`, `context.contexts`, `final_decision`, `long_answer` | PubMedQA                   |
| `question_answer` | `question`, `answer`, optionally `context`, `options`           | GSM8K, MedQuAD, MedQA      |
| `xlam`            | `query`, `tools`, `answers`: JSON strings                       | xlam-function-calling-60k  |
| `glaive`          | `system`, `chat`: a whole conversation in one string            | glaive-function-calling-v2 |

`RENAMED` has other names that some of them use.
"""

from __future__ import annotations

import re
from typing import Any

from eaftdrope.errors import DataError

from .fields import REASONING, Fields, from_json, is_empty, raw_decode
from .messages import refuse_empty, spoken, string
from .tools import read_call, read_tools

RENAMED = {
    "Question": "question",
    "Answer": "answer",
    "Complex_CoT": "reasoning",
    "Response": "response",
    "reasoning (reasoning_content)": "reasoning",
    "response (content)": "response",
}
# Python's names of types, as xLAM writes them, in JSON schema. A type that is not listed is left out.
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
_OPTIONS = frozenset({"options", "choices"})
# An option that carries its own letter: "A) 21", "(b) 3", "C. x".
_LABELLED = re.compile(r"\(?[A-Za-z1-9][).:]")
_SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = re.compile(r"""\{\s*"name":\s*("[^"]*")\s*,\s*"arguments":\s*'(.*)'\s*\}$""", re.DOTALL)


def renamed(row: dict[str, Any]) -> Fields:
    """Return `row` with the names of this module, unless they are in use."""
    values, names = {}, {}
    for name, value in row.items():
        new = RENAMED.get(name, name)
        if new != name and (row.get(new) is not None or new in names):
            new = name
        if new != name:
            names[new] = name
        if value is not None or new not in values:
            values[new] = value
    return Fields(values, names)


def question_answer(row: Fields) -> dict[str, Any]:
    return {"messages": [_question(row), answer(row, "answer")]}


def reasoning(row: Fields) -> dict[str, Any]:
    """Return the reasoning apart from the answer: the chat template decides where it is written."""
    return {"messages": [_question(row), answer(row, "response")]}


def pubmedqa(row: Fields) -> dict[str, Any]:
    """Return question and answer; the label is first in the answer, so that a few tokens of it can be scored."""
    asked = f"Question: {string(row.get('question'), row.place('question'))}\nAnswer yes, no or maybe, then explain."
    passages = _passages(row)
    prompt = f"Context: {passages}\n\n{asked}" if passages else asked
    said = [string(row.get(name), row.place(name)) for name in ("final_decision", "long_answer")]
    return {"messages": [spoken("user", prompt, row, "question"), {**_assistant(row), "content": ". ".join(said)}]}


def xlam(row: Fields) -> dict[str, Any]:
    """Return the calls; `parameters` of a tool, a mapping of arguments there, becomes a JSON schema."""
    calls, tools = _json_list(row, "answers"), _json_list(row, "tools")
    own = {"tools": [{**tool, "parameters": _schema(tool.get("parameters") or {})} for tool in tools]}
    message = {**_assistant(row), "content": ""}
    message["tool_calls"] = [read_call(call, row, "answers", index) for index, call in enumerate(calls)]
    refuse_empty(message, row.place("answers"))
    return {"messages": [spoken("user", row.get("query"), row, "query"), message], "tools": read_tools(row, own)}


def glaive(row: Fields) -> dict[str, Any]:
    """Return the conversation; a system text that only announces the functions is left to the chat template."""
    system = string(row.get("system"), "system").removeprefix("SYSTEM:").strip()
    tools = _objects(system)
    messages = [] if tools or not system else [{"role": "system", "content": system}]
    pieces = _SPEAKER.split(string(row.get("chat"), "chat"))
    if len(pieces) < 3:
        raise DataError("chat has no USER: and ASSISTANT: turns")
    for number, (speaker, text) in enumerate(zip(pieces[1::2], pieces[2::2])):
        text = text.strip().removesuffix("<|endoftext|>").strip()
        message: dict[str, Any] = {"role": _GLAIVE_ROLES[speaker], "content": text}
        if speaker == "ASSISTANT" and "<functioncall>" in text:
            said, _, call = text.partition("<functioncall>")
            call = _glaive_call(call.strip(), number)
            message |= {"content": said.strip(), "tool_calls": [read_call(call, row, "chat", number)]}
        refuse_empty(message, f"chat, turn {number}")
        messages.append(message)
    return {"messages": messages, "tools": read_tools(row, {"system": tools})}


# --- pieces -----------------------------------------------------------------------------------------------------------


def answer(row: Fields, name: str) -> dict[str, Any]:
    """Return the assistant's turn: its text in the column `name`, its reasoning in `reasoning` (`thinking`, `cot`, ...)."""
    text = string(row.get(name), row.place(name))
    return {**_assistant(row), **spoken("assistant", text, row, name)}


def _assistant(row: Fields) -> dict[str, Any]:
    thought = row.agreed(REASONING, "reasoning")
    for key, value in row.among(REASONING):
        string(value, row.place(key))
    return {"role": "assistant"} if thought is None else {"role": "assistant", "reasoning_content": thought}


def _question(row: Fields) -> dict[str, Any]:
    """Return the user's turn: the context before the question, the options after it, if the row has them."""
    asked = string(row.get("question"), row.place("question"))
    passages = _passages(row)
    if passages:
        asked = f"Context: {passages}\n\nQuestion: {asked}"
    options = row.agreed(_OPTIONS, "options")
    if options is not None:
        asked = f"{asked}\n\n{_options(options)}"
    return spoken("user", asked, row, "question")


def _passages(row: Fields) -> str:
    context = passages = row.get("context")
    if is_empty(context):
        return ""
    if isinstance(context, dict):
        passages = row.inner(context, "context").get("contexts")
    if isinstance(passages, str):
        passages = [passages]
    if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
        raise DataError("context must be a string, a list of strings, or an object with such a list as contexts")
    return " ".join(passages)


def _options(options: Any) -> str:
    """Return a line for each option: `A. aspirin`. The answer stays as it is in the row."""
    if isinstance(options, str):
        return options
    if isinstance(options, dict) and {"label", "text"} == options.keys():
        labels, texts = options["label"], options["text"]
    elif isinstance(options, dict):
        labels, texts = list(options), list(options.values())
    else:
        labels, texts = None, options
    if not isinstance(texts, list) or not all(isinstance(text, str | int | float) for text in texts):
        raise DataError("options must be a list of strings, or an object of strings by letter")
    if labels is None:
        labels = [chr(ord("A") + number) for number in range(len(texts))]
    if not isinstance(labels, list) or len(labels) != len(texts) or len(texts) > 26:
        raise DataError("options must have one label for each text, at most 26")
    is_labelled = all(isinstance(text, str) and _LABELLED.match(text) for text in texts)
    return "\n".join(str(text) if is_labelled else f"{label}. {text}" for label, text in zip(labels, texts))


def _json_list(row: Fields, name: str) -> list[dict[str, Any]]:
    value = from_json(row.get(name), row.place(name))
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{row.place(name)} must be a list of objects, or a JSON string of one")
    return value


def _schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return xLAM's `{argument: {"type": "str, optional", "description": ..., "default": ...}}` as a JSON schema."""
    if not all(
        isinstance(argument, dict) and isinstance(argument.get("type"), str) for argument in parameters.values()
    ):
        return parameters
    properties, required = {}, []
    for name, argument in parameters.items():
        written = argument["type"]
        kind = _SCHEMA_TYPES.get(re.split(r"\W", written, maxsplit=1)[0].lower())
        rest = {key: value for key, value in argument.items() if key != "type"}
        properties[name] = {"type": kind, **rest} if kind else rest
        if "default" not in argument and not written.endswith("optional"):
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects from the first brace on, one after the other."""
    found, position = [], text.find("{")
    while position >= 0:
        value, position = raw_decode(text, position, "system", "system has a function that is not valid JSON")
        found.append(value)
        position = text.find("{", position)
    return found


def _glaive_call(text: str, number: int) -> Any:
    """Parse `{"name": "f", "arguments": '{"x": 1}'}`: JSON except for the single quotes."""
    where = f"chat, turn {number}: the <functioncall>"
    quoted = _GLAIVE_CALL.match(text)
    if quoted is None:
        return from_json(text, where, f"{where} is not valid JSON")
    arguments = quoted[2].replace("\\'", "'")
    name = from_json(quoted[1], where, f"{where} is not valid JSON")
    return {
        "name": name,
        "arguments": from_json(arguments, where, f"{where} is not valid JSON") if arguments.strip() else {},
    }
