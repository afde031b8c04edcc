"""Tools and calls: one clean shape of what OpenAI, ShareGPT and others write, and a text rendering with its inverse.

The text rendering is for chat templates that silently drop `tools` or `tool_calls` (see `chat.py`, which finds out):

    system      {system text}\n\n{instructions}\n<tools>[{"name": ...}, ...]</tools>
    assistant   {content}\n<tool_call>[{"name": ..., "arguments": {...}}, ...]</tool_call>
    user        <tool_response>{result}</tool_response>                     (consecutive results share one turn)
"""

from __future__ import annotations

import json
from typing import Any

from eaftdrope.errors import DataError

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_INSTRUCTIONS = (
    "You can call functions. These are their definitions:\n<tools>{tools}</tools>\n\n"
    "To call functions, answer with all calls in one list:\n"
    '<tool_call>[{{"name": "function_name", "arguments": {{"argument": "value"}}}}]</tool_call>'
)


def normalise_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools as a list of `{"type": "function", "function": {...}}`, from a list or a JSON string; None if there are none.

    Raises:
        DataError: not JSON, not a list of objects, or a tool without a name.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _loads(value, "tools")
    if not value:
        return None
    if not isinstance(value, list):
        raise DataError(f"tools must be a list or a JSON string of one; it is a {type(value).__name__}")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(value)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _loads(tool, where)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} must be an object with a name (or with a function that has one)")
    return {"type": "function", "function": function}


def normalise_call(call: Any, where: str) -> dict[str, Any]:
    """One call as `{"type": "function", "function": {"name": str, "arguments": dict}}` (with `id` if it had one).

    Raises:
        DataError: no name, or arguments that are neither an object nor a JSON string of one.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} must be an object with function.name and function.arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"{where}.function.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.function.arguments must be an object; it is a {type(arguments).__name__}")
    clean = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **clean} if call.get("id") is not None else clean


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is a string but not valid JSON: {error.msg} at column {error.colno}") from error


def render_tool_calls(calls: list[dict[str, Any]]) -> str:
    """Calls (in the shape of `normalise_call`) as text; `parse_tool_calls` is the inverse."""
    plain = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    return f"{_OPEN}{json.dumps(plain, ensure_ascii=False)}{_CLOSE}"


def parse_tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls in a model's answer as `{"name": str, "arguments": dict}` each, or None if there is no well-formed call.

    Understood: `<tool_call>` blocks that hold one call or a list of them, and an answer that is bare JSON (one call or a
    list), with `parameters` accepted for `arguments`. One malformed block makes the whole answer None.
    """
    decoder = json.JSONDecoder()
    if _OPEN not in text:
        try:
            return _calls(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            return None
    found: list[dict[str, Any]] = []
    position = text.find(_OPEN)
    while position >= 0:
        start = position + len(_OPEN)
        start += len(text[start:]) - len(text[start:].lstrip())
        try:
            # Decoded, not searched for the closing tag: an argument may itself contain "</tool_call>".
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            return None
        calls = _calls(value)
        rest = text[end:].lstrip()
        if calls is None or not rest.startswith(_CLOSE):
            return None
        found += calls
        position = text.find(_OPEN, len(text) - len(rest) + len(_CLOSE))
    return found


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """`value` as calls, or None if it is anything else (an empty list is no call)."""
    values = value if isinstance(value, list) else [value]
    calls = []
    for item in values:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        arguments = item.get("arguments", item.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (json.JSONDecodeError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": item["name"], "arguments": arguments})
    return calls or None


def as_plain_messages(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, has_system_role: bool
) -> list[dict[str, Any]]:
    """The conversation with tools, calls and results as text, for a template that knows only role and content.

    Assistant turns stay assistant turns, in order; consecutive tool results become one user turn.

    Raises:
        DataError: the template has no system role and the conversation does not begin with the user.
    """
    plain: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            response = f"<tool_response>{message['content']}</tool_response>"
            if follows_result:
                plain[-1]["content"] += f"\n{response}"
            else:
                plain.append({"role": "user", "content": response})
        else:
            plain.append({key: value for key, value in message.items() if key != "tool_calls"})
            if message.get("tool_calls"):
                calls = render_tool_calls(message["tool_calls"])
                plain[-1]["content"] = "\n".join(filter(None, (message["content"], calls)))
        follows_result = is_result
    if tools:
        _add_tools(plain, tools, has_system_role)
    return plain


def _add_tools(plain: list[dict[str, Any]], tools: list[dict[str, Any]], has_system_role: bool) -> None:
    text = _INSTRUCTIONS.format(tools=json.dumps([tool["function"] for tool in tools], ensure_ascii=False))
    first = plain[0]
    if first["role"] in ("system", "developer"):
        first["content"] = "\n\n".join(filter(None, (first["content"], text)))
    elif has_system_role:
        plain.insert(0, {"role": "system", "content": text})
    elif first["role"] == "user":
        first["content"] = f"{text}\n\n{first['content']}"
    else:
        raise DataError(
            "the template has no system role, and the first message is not the user's: no place for the tools"
        )
