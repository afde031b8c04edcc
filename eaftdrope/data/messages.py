"""Messages in one clean form, from those that OpenAI, ShareGPT and others write.

- Roles: system, developer, user, assistant, tool; `function` and `ipython` are older names of tool. ShareGPT's are in
  `SHAREGPT_ROLES`.
- Calls are under `tool_calls`, `function_call` and similar names; their arguments under any name (see `tools.py`).
- Reasoning is under `reasoning_content`, `reasoning`, `thinking` and similar names; it becomes `reasoning_content`.
- Content that would be lost (pictures, sounds, a refusal, a prefix) is refused; other keys are reported.

A turn has a weight in the loss, or is trained or not, under the names that data sets and trainers have for it:

| meaning                             | keys                                                                           |
|-------------------------------------|--------------------------------------------------------------------------------|
| factor on the loss, 0: not trained  | `weight`, `loss_weight`, `loss_scale`, `train_weight`, `training_weight`       |
| 1 or true: trained, 0 or false: not | `train`, `trainable`, `training`, `loss`, `loss_mask`...                       |
| true: not trained, false: trained   | `mask`, `masked`, `is_masked`, `ignore`, `ignore_loss`...                      |

A row may have a factor too, under the same names and `sample_weight`. A part of a turn (`train_detail`) cannot be honoured
and is refused.
"""

from __future__ import annotations

import re
from typing import Any

from eaftdrope.errors import DataError

from .fields import MEDIA, REASONING, SYSTEM, TOOLS, Fields, from_json, is_empty, plain_name, to_json
from .tools import read_call
from .weights import LARGEST, is_weight

_ROLES = ("system", "developer", "user", "assistant", "tool")
_OLDER_ROLES = {"function": "tool", "ipython": "tool"}
SHAREGPT_ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLS = frozenset({"toolcalls", "toolcall", "functioncall", "functioncalls"})
# Keys of a message that no template receives: refused unless empty.
_LOST = MEDIA | {"refusal", "attachments", "prefix", "partial", "reasoningdetails"}
# A message with only these keys needs no further search.
_USUAL = frozenset({"role", "content", "from", "value", "name", "tool_call_id"})
_HINT = r"<(?:image|video|audio)(?:_?\d+)?>|<\|(?:image|video|audio)(?:_?\w+)?\|>|\[(?:IMG|IMAGE)\]"
# A placeholder at the edge of a line, as data sets of pictures have it. Within a sentence a tag is only mentioned.
_PLACEHOLDER = re.compile(rf"(?:^[ \t]*)({_HINT})|({_HINT})(?=[ \t]*$)|(<image>)(?![`'\"])", re.MULTILINE)


def read_messages(value: Any, row: Fields, field: str) -> list[dict[str, Any]]:
    """Return the messages of role and content under `field` of the row.

    Raises:
        DataError: not a list, or a message that cannot be used.
    """
    return [_message(turn) for turn in _objects(value, row, field, "messages", "the fields role and content")]


def read_turns(value: Any, row: Fields, field: str) -> list[dict[str, Any]]:
    """Return the same from ShareGPT's turns of from and value."""
    return [_turn(turn) for turn in _objects(value, row, field, "turns", "the fields from and value")]


def with_system(row: Fields, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the system turn of the row's `system` column (`system_prompt`, ...) in front of `messages`, if it has one.

    Raises:
        DataError: the conversation begins with another system turn, or two columns differ.
    """
    value = row.agreed(SYSTEM, "system turn")
    if value is None:
        return messages
    name = next(key for key, given in row.among(SYSTEM) if not is_empty(given))
    text = content_text(value, "system", row, name)
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if first["content"].strip() not in ("", text.strip()):
        raise DataError(
            f"{row.place(name)} and the first message are both the system turn, and differ. Keep one, or join them"
        )
    return [{**first, "content": text}, *messages[1:]]


def content_text(content: Any, role: str, fields: Fields, key: str) -> str:
    """Return content as one string: null is empty, text parts are joined, a tool's structured result becomes JSON."""
    if content is None:
        return ""
    where = fields.place(key)
    if isinstance(content, str):
        found = _PLACEHOLDER.search(content) if role != "assistant" and ("<" in content or "[I" in content) else None
        if found and not _is_markup(content, found):
            raise DataError(
                f"{where} has the placeholder {found[0].strip()}: only text is trained, so the row would be trained "
                "without what it is about. Leave the row out"
            )
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        return _joined_parts(content, role, fields, key)
    if role == "tool":
        return to_json(content, where)
    raise DataError(f"{where} must be a string, null or a list of text parts; it is a {type(content).__name__}")


def spoken(role: str, content: Any, row: Fields, key: str) -> dict[str, Any]:
    """Return a message whose text is a column of the row.

    Raises:
        DataError: it is not text, or empty.
    """
    message = {"role": role, "content": content_text(content, role, row, key)}
    refuse_empty(message, row.place(key), "null" if content is None else "empty")
    return message


def refuse_empty(message: dict[str, Any], where: str, kind: str = "empty") -> None:
    """Refuse an empty user message, or an assistant message with neither text nor calls."""
    role = message["role"]
    if message["content"] or message.get("tool_calls") or role not in ("assistant", "user"):
        return
    also = " and there are no tool_calls" if role == "assistant" else ""
    raise DataError(f"{where} is {kind}{also}: the {role} message says nothing")


# --- one message ------------------------------------------------------------------------------------------------------


def _objects(value: Any, row: Fields, field: str, kind: str, needed: str) -> list[Fields]:
    value = from_json(value, row.place(field))
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.place(field)} must be a list of {kind} that is not empty")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{row.place(field)}[{index}] must be an object with {needed}")
    return [row.inner(item, field, index) for index, item in enumerate(value)]


def _message(turn: Fields) -> dict[str, Any]:
    role = turn.get("role")
    if not isinstance(role, str):
        raise DataError(f"{turn.where} must be an object with the fields role and content")
    if role not in _ROLES and role not in _OLDER_ROLES:
        raise DataError(f"{turn.where}.role is {role!r}; known are {', '.join(_ROLES)}")
    return _clean(turn, _OLDER_ROLES.get(role, role), "content")


def _turn(turn: Fields) -> dict[str, Any]:
    written = turn.get("from")
    if written is None or "value" not in turn.values:
        raise DataError(f"{turn.where} must be an object with the fields from and value")
    role = SHAREGPT_ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        raise DataError(f"{turn.where}.from is {written!r}; known are {', '.join(SHAREGPT_ROLES)}")
    if written not in ("function_call", "tool_call"):
        return _clean(turn, role, "value")
    return _clean(turn, role, None, _read_calls(turn, "value"))


def _clean(turn: Fields, role: str, key: str | None, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the message, with its text under `key` (None: it has no text)."""
    content = turn.get(key) if key else ""
    clean: dict[str, Any] = {"role": role, "content": content_text(content, role, turn, key) if key else ""}
    for name in ("name", "tool_call_id"):
        if turn.get(name) is not None:
            if isinstance(turn.get(name), dict | list):
                raise DataError(f"{turn.place(name)} must be a string; it is a {type(turn.get(name)).__name__}")
            clean[name] = turn.get(name)
    usual = _USUAL.issuperset(turn.values)
    if not usual:
        calls = _more_calls(turn, calls)
    if calls:
        if role != "assistant":
            raise DataError(f"{turn.where} has tool_calls, but only an assistant message may call")
        clean["tool_calls"] = calls
    if not usual:
        clean |= _extras(turn, role)
    refuse_empty(clean, turn.place(key or "value"), "null" if content is None else "empty")
    return clean


def _extras(turn: Fields, role: str) -> dict[str, Any]:
    """Return what a message has beside role, content and calls."""
    extras: dict[str, Any] = {}
    reasoning = turn.agreed(REASONING, "reasoning")
    if reasoning is not None:
        name = next(key for key, value in turn.among(REASONING) if not is_empty(value))
        if role != "assistant":
            raise DataError(f"{turn.place(name)} is reasoning, but the turn is not the assistant's")
        extras["reasoning_content"] = string(reasoning, turn.place(name))
    for key, value in turn.among(REASONING):
        if not isinstance(value, str):
            raise DataError(f"{turn.place(key)} must be a string; it is a {type(value).__name__}")
    for key, value in turn.among(_LOST):
        repeated = key == "reasoning_details" and reasoning is not None
        if not is_empty(value) and value is not False and not repeated:
            raise DataError(
                f"{turn.place(key)} is not read: only content, calls and reasoning are trained, so the turn would be "
                "trained without it. Write it into the content, or leave the row out"
            )
    for key, value in turn.among(TOOLS):
        if not is_empty(value):
            if role not in ("system", "developer"):
                raise DataError(
                    f"{turn.place(key)}: tools belong to the row or to its system turn, not to a {role} turn"
                )
            turn.row.turn_tools.append((turn.place(key), value))
    if role == "tool" and "name" not in turn.values and turn.get("tool_name") is not None:
        extras["name"] = string(turn.get("tool_name"), turn.place("tool_name"))
    weight = turn_weight(turn, role)
    return extras if weight is None else {**extras, "weight": weight}


def _more_calls(turn: Fields, calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the calls under all names for them; several names must give the same calls."""
    first = "value"
    for key, _ in turn.among(_CALLS):
        more = _read_calls(turn, key)
        if not more:
            continue
        if calls and [call["function"] for call in calls] != [call["function"] for call in more]:
            raise DataError(f"{turn.place(first)} and {turn.place(key)} are both the calls of the turn, and differ")
        calls, first = calls or more, key
    return calls


def _read_calls(turn: Fields, key: str) -> list[dict[str, Any]]:
    value = turn.get(key)
    if isinstance(value, str):
        value = from_json(value, turn.place(key)) if value.strip() or key == "value" else []
    if is_empty(value):
        return []
    if isinstance(value, dict):
        return [read_call(value, turn, key, None)]
    if not isinstance(value, list):
        raise DataError(f"{turn.place(key)} must be a list of calls; it is a {type(value).__name__}")
    return [read_call(call, turn, key, index) for index, call in enumerate(value)]


def _joined_parts(parts: list[dict[str, Any]], role: str, fields: Fields, key: str) -> str:
    other = sorted({str(part["type"]) for part in parts} - {"text"})
    if other:
        raise DataError(f"{fields.place(key)} has parts of type {', '.join(other)}; only text is trained")
    texts = []
    for index, part in enumerate(parts):
        inner = fields.inner(part, key, index)
        inner.get("type")
        texts.append(content_text(string(inner.get("text"), inner.place("text")), role, inner, "text"))
    return "".join(texts)


def _is_markup(content: str, found: re.Match[str]) -> bool:
    """Return whether the placeholder is a tag that the text closes, or one that it quotes."""
    tag = found[0].strip()
    quoted = content[: found.start()].endswith(("`", "'", '"'))
    return quoted or (tag.startswith("<") and f"</{tag[1:]}" in content)


def string(value: Any, where: str) -> str:
    """Return `value`, which must be a string."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string; it is a {type(value).__name__}")
    return value


# --- weights of turns -------------------------------------------------------------------------------------------------

_TRAINED = frozenset(
    {"train", "trained", "trainable", "training", "istrained", "istrainable", "trainonturn"}
    | {"trainon", "trainthis", "trainturn", "trainmask", "shouldtrain", "learn"}
    | {"loss", "lossmask", "computeloss", "calculateloss", "hasloss"}
    | {"useloss", "lossonturn", "inloss", "includeinloss", "supervise", "supervised"}
)
_CONTEXT = frozenset(
    {"mask", "masked", "ismasked", "maskloss", "maskout", "ignore", "ignored", "isignored", "ignoreloss", "lossignore"}
    | {"ignoreinloss", "noloss", "skiploss", "skiptraining", "skiptrain", "notrain", "donttrain", "donottrain"}
    | {"excludefromloss", "excludefromtraining", "nottrained", "iscontext", "contextonly"}
)
_PARTS = frozenset(
    {"traindetail", "trainingdetail", "traindetails", "trainspans", "trainablespans", "trainedspans", "lossspans"}
    | {"maskspans", "maskedspans"}
)
_FACTORS = frozenset({"weight", "lossweight", "lossscale", "trainweight", "trainingweight"})
# Lists of numbers in most data sets.
_PLURAL = frozenset({"weights", "lossweights"})
MARKS = _TRAINED | _CONTEXT | _PARTS | _FACTORS | _PLURAL
# Those that have only this meaning on a whole row: a row's `loss` may be a measurement.
_OF_ROWS = MARKS - _FACTORS - {"weights", "loss", "training", "trainon", "learn", "ignored", "supervised"}


def is_weight_of_turn(key: str) -> bool:
    """Return whether a key of a turn is read as the factor on its loss, or as the mark that it is trained."""
    return plain_name(key) in _TRAINED | _FACTORS


def turn_weight(turn: Fields, role: str) -> float | None:
    """Return the factor on the loss of the turn (0: context) if it has one or is marked, else None.

    Raises:
        DataError: a value that is no weight or of another type, two keys that disagree, a part of a turn, or a turn of
            another role that is marked as trained.
    """
    found: tuple[str, float] | None = None
    for key, value in turn.among(MARKS):
        name = plain_name(key)
        weight = _weight(name, value, turn.place(key))
        if weight is None:
            continue
        # a mark agrees with every factor above 0
        agree = found is None or bool(found[1]) == bool(weight)
        if found and (not agree or (1 not in (found[1], weight) and found[1] != weight)):
            raise DataError(f"{turn.place(found[0])} and {turn.place(key)} disagree on whether the turn is trained")
        found = found if found and weight == 1 else (key, weight)
    if found is None:
        return None
    if found[1] and role != "assistant":
        raise DataError(
            f"{turn.place(found[0])} marks a {role} turn as trained, but only assistant turns are. Remove the key "
            "(`train_on: all` trains every turn)"
        )
    return found[1]


def row_weight(row: Fields) -> float:
    """Return the factor on the loss of the row, 1 without any.

    A `weight` that is text is left alone: it is a measurement, and reported as not read.

    Raises:
        DataError: a factor that is no weight, or two that differ; the row is marked as not trained (leaving it out of the
            file is clearer), or carries one mark for each turn or token.
    """
    found: tuple[str, float] | None = None
    for key, value in row.values.items():
        name = plain_name(str(key))
        if name not in MARKS | {"sampleweight"} or is_empty(value):
            continue
        if isinstance(value, int | float) and name in _FACTORS | {"sampleweight"}:
            weight = _factor(row.get(key), row.place(key))
            if found and found[1] != weight:
                raise DataError(
                    f"{row.place(found[0])} and {row.place(key)} are both the weight of the row, and differ"
                )
            found = key, weight
            continue
        if isinstance(value, str) and name in _FACTORS | {"sampleweight"}:
            continue
        if isinstance(value, list | tuple | dict):
            raise DataError(
                f"{row.place(key)} marks parts of the row, which is not read. Mark each message with `weight`: 0 (not "
                "trained) or 1"
            )
        if name not in _OF_ROWS and value not in (0, 1):
            continue
        if _weight(name, value, row.place(key)) == 0:
            raise DataError(f"{row.place(key)} marks the whole row as not trained: leave the row out")
        row.get(key)
    return found[1] if found else 1.0


def _factor(value: Any, where: str) -> float:
    if not is_weight(value):
        raise DataError(f"{where} is {value!r}; it must be a number from 0 (not trained) to {LARGEST:g}")
    return float(value)


def _weight(name: str, value: Any, where: str) -> float | None:
    if name in _PARTS:
        if is_empty(value):
            return None
        raise DataError(
            f"{where} marks parts of a turn, which is not read: a turn is trained whole (`weight`: a factor on its loss) or "
            "not at all (0)"
        )
    if name in _FACTORS:
        return _factor(value, where)
    if name in _CONTEXT:
        # A mask of 1 means "trained" in some data sets and "left out" in others.
        if not isinstance(value, bool):
            raise DataError(f"{where} is {value!r}; it must be true (not trained) or false (trained)")
        return int(not value)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise DataError(f"{where} is {value!r}; it must be 0 (not trained) or 1 (trained)")
    return int(value)
