"""Tools and calls: one clean form of those that OpenAI, ShareGPT and others write, and a text rendering with its inverse.

The text rendering is for chat templates that silently drop `tools` or `tool_calls` (`template.py` finds out):

    system      {system text}\n\n{instructions}\n<tools>[{"name": ...}, ...]</tools>
    assistant   {content}\n<tool_call>[{"name": ..., "arguments": {...}}, ...]</tool_call>
    user        <tool_response>{result}</tool_response>                     (consecutive results share one turn)
"""

from __future__ import annotations

import json
from typing import Any

from eaftdrope.errors import DataError

from .fields import TOOLS, Fields, from_json, plain_name

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_INSTRUCTIONS = (
    "You can call functions. These are their definitions:\n<tools>{tools}</tools>\n\n"
    "To call functions, answer with all calls in one list:\n"
    '<tool_call>[{{"name": "function_name", "arguments": {{"argument": "value"}}}}]</tool_call>'
)


# The names of arguments in data sets: OpenAI's first, Llama's `parameters`, Anthropic's `input`, Gemini's `args`.
_ARGUMENTS = frozenset(
    {"arguments", "argument", "parameters", "params", "args", "input", "inputs", "kwargs", "toolinput", "toolargs"}
    | {"toolarguments", "functionargs", "functionarguments", "functionparameters", "actioninput"}
)
_NAMES = frozenset({"name", "toolname", "functionname"})
_SCHEMAS = frozenset({"inputschema"})
# Keys that a call without arguments may have; `function` holds its name.
_BESIDE = frozenset({"type", "function", "id", "callid", "toolcallid", "index", "status"})
_TYPES = ("function", "function_call", "tool_call", "tool_use", "tool")


def read_tools(row: Fields, own: dict[str, Any] | None = None) -> list[dict[str, Any]] | None:
    """Return the tools of a row as `{"type": "function", "function": {...}}` each; None if it has none.

    They are in the column `tools` (`functions`, ...) or in the system turn; `own` has, by column, those that the row's format
    has already parsed.

    Raises:
        DataError: not JSON, not a list of objects, a tool without a name, or two places that differ.
    """
    own = own or {}
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for place, value, key in [
        *((row.place(key), value, key) for key, value in row.among(TOOLS) if key not in own),
        *((row.place(key), value, None) for key, value in own.items()),
        *((place, value, None) for place, value in row.turn_tools),
    ]:
        value = from_json(value, place) if not isinstance(value, str) or value.strip() else None
        if not value:
            continue
        if not isinstance(value, list):
            raise DataError(f"{place} must be a list or a JSON string of one; it is a {type(value).__name__}")
        made = [_tool(tool, f"{place}[{index}]", row, key, index) for index, tool in enumerate(value)]
        if found and found[0][1] != made:
            raise DataError(f"{found[0][0]} and {place} are both the tools of the row, and differ; keep one")
        found.append((place, made))
    return found[0][1] if found else None


def _tool(tool: Any, where: str, row: Fields, key: str | None, index: int) -> dict[str, Any]:
    tool = from_json(tool, where)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise DataError(f"{where} must be an object with a name (or with a function that has one)")
    if function is not tool and key is not None:
        # The template receives what is inside; what is beside it is not passed on.
        beside = row.inner(tool, key, index)
        beside.get("type"), beside.get("function")
    schema = next((name for name in function if plain_name(str(name)) in _SCHEMAS), None)
    if schema is not None and "parameters" not in function:
        function = {("parameters" if name == schema else name): value for name, value in function.items()}
    return {"type": "function", "function": function}


def read_call(call: Any, outer: Fields, key: str, index: int | None) -> dict[str, Any]:
    """Return one call as `{"type": "function", "function": {"name": str, "arguments": dict}}` (with `id` if it had one).

    Args:
        call (`Any`): the call as written.
        outer (`Fields`): the object that contains it.
        key (`str`): its key there.
        index (`int`, *optional*): its index in a list under `key`.

    Raises:
        DataError: no name, arguments that are neither an object nor a JSON string of one, or arguments under
            two names or under an unknown one.
    """
    where = outer.place(key) if index is None else f"{outer.place(key)}[{index}]"
    call = from_json(call, where)
    if not isinstance(call, dict):
        raise DataError(f"{where} must be an object with function.name and function.arguments")
    places = [outer.inner(call, key, index)]
    wrapper = next((name for name in ("function", "function_call", "functionCall") if call.get(name) is not None), None)
    is_wrapped = wrapper is not None and _is_object(call[wrapper])
    inside = from_json(call[wrapper], f"{where}.{wrapper}") if is_wrapped else None
    if wrapper is not None and isinstance(inside, dict):
        places.insert(0, places[0].inner(inside, wrapper))
    name = _named(places, where)
    arguments = _arguments(places, name, where)
    clean = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("type") in _TYPES:
        places[-1].get("type")
    found = next((fields.get("id") for fields in reversed(places) if fields.values.get("id") is not None), None)
    return clean if found is None else {"id": found, **clean}


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{"))


def _named(places: list[Fields], where: str) -> str:
    names = [(place.place(key), value) for place in places for key, value in place.among(_NAMES)]
    if not names and isinstance(places[-1].values.get("function"), str):
        names = [(f"{where}.function", places[-1].get("function"))]
    for place, name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where} must be an object with function.name and function.arguments")
        if name != names[0][1]:
            raise DataError(f"{names[0][0]} and {place} are both the name of the call, and differ; keep one")
    if not names:
        raise DataError(f"{where} must be an object with function.name and function.arguments")
    return names[0][1]


def _arguments(places: list[Fields], name: str, where: str) -> dict[str, Any]:
    found: list[tuple[str, dict[str, Any]]] = []
    is_given = False
    for place in places:
        for key, value in place.among(_ARGUMENTS):
            at, is_given = place.place(key), True
            if isinstance(value, str):
                value = from_json(value, at) if value.strip() else {}
            if value is None:
                continue
            if not isinstance(value, dict):
                raise DataError(f"{at} must be an object; it is a {type(value).__name__}")
            if value and found and value != found[0][1]:
                raise DataError(f"{found[0][0]} and {at} are both the arguments of the call, and differ; keep one")
            found += [(at, value)] if value else []
    if found:
        return found[0][1]
    # No arguments: either the call has none, or they are under an unknown key.
    for place in places:
        for key in place.unread():
            may_be_them = not is_given or (isinstance(place.values[key], dict) and place.values[key])
            if plain_name(str(key)) not in _BESIDE and may_be_them:
                raise DataError(
                    f"{where} has no arguments, and {place.place(key)} is not read. Put the arguments under `arguments`"
                )
    if is_given:
        return {}
    places[0].row.bare_calls.append((name, where))
    return {}


def refuse_bare_calls(row: Fields, tools: list[dict[str, Any]] | None) -> None:
    """Refuse a call without a key of arguments, of a tool that requires some: they were lost.

    Raises:
        DataError: the row has such a call.
    """
    required = {}
    for tool in tools or ():
        parameters = tool["function"].get("parameters")
        named = parameters.get("required") if isinstance(parameters, dict) else None
        required[tool["function"]["name"]] = named if isinstance(named, list) else []
    for name, where in row.bare_calls:
        if required.get(name):
            raise DataError(
                f"{where} has no arguments, but the tool {name} requires {', '.join(map(str, required[name]))}. Put them "
                "under `arguments` ({} for a call without)"
            )


def render_tool_calls(calls: list[dict[str, Any]]) -> str:
    """Write calls (in the form of `read_call`) as text; `parse_tool_calls` is the inverse."""
    plain = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    return f"{_OPEN}{json.dumps(plain, ensure_ascii=False)}{_CLOSE}"


def parse_tool_calls(text: str) -> list[dict[str, Any]] | None:
    """Parse the calls in a model's answer as `{"name": str, "arguments": dict}` each; None if no call is well-formed.

    Understood: `<tool_call>` blocks that hold one call or a list of them, and an answer that is bare JSON (one call or a
    list), with `parameters` accepted for `arguments`. One malformed block makes the whole answer None.
    """
    decoder = json.JSONDecoder()
    if _OPEN not in text:
        try:
            return _calls(json.loads(text))
        except (ValueError, RecursionError):
            return None
    found: list[dict[str, Any]] = []
    position = text.find(_OPEN)
    while position >= 0:
        start = position + len(_OPEN)
        start += len(text[start:]) - len(text[start:].lstrip())
        try:
            # Decoded, not searched for the closing tag: an argument may itself contain "</tool_call>".
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return None
        calls = _calls(value)
        rest = text[end:].lstrip()
        if calls is None or not rest.startswith(_CLOSE):
            return None
        found += calls
        position = text.find(_OPEN, len(text) - len(rest) + len(_CLOSE))
    return found


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """Return `value` as calls, or None if it is anything else (an empty list is not a call)."""
    values = value if isinstance(value, list) else [value]
    calls = []
    for item in values:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        arguments = item.get("arguments", item.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": item["name"], "arguments": arguments})
    return calls or None


def as_plain_messages(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, has_system_role: bool
) -> list[dict[str, Any]]:
    """Write the conversation with tools, calls and results as text, for a template that has only role and content.

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
