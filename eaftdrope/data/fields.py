"""The keys of a row, noted as they are read, so that none is lost silently; and JSON inside a row.

Every object of a row (the row itself, a message, a call, a part of a content) is read through a `Fields`. A key that was
never read is reported with its path, without indices: `messages[].timestamp`. A key that is null counts as absent.

Data sets use many names for the same thing. If the meaning is the same beyond doubt, all of them are read; names are
compared without case, underscores, hyphens and spaces (`systemPrompt` is `system_prompt`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from eaftdrope.errors import DataError

SYSTEM = frozenset({"system", "systemprompt", "systemmessage", "systeminstruction", "systeminstructions"})
TOOLS = frozenset(
    {"tools", "functions", "availabletools", "availablefunctions", "tooldefinitions", "functiondefinitions"}
    | {"toolschemas", "functionschemas", "functiondeclarations"}
)
REASONING = frozenset(
    {"reasoning", "reasoningcontent", "reasoningtext", "thinking", "thinkingcontent", "thought", "thoughts", "think"}
    | {"cot", "chainofthought", "complexcot"}
)
MEDIA = frozenset(
    {f"{kind}{ending}" for kind in ("image", "audio", "video") for ending in ("", "s", "path", "paths", "url", "urls")}
    | {"img", "imgs", "imagefile", "audiofile", "videofile", "pixelvalues"}
)
# Keys that describe the origin of a row: not in the warnings, but in the table.
_METADATA = re.compile(
    r"(\b|_)(u?u?id|guid|ids|idx|index|hash|md5|sha1|sha256|urls?|uri|link|sources?|dataset|subset|split|licen[sc]e|"
    r"timestamp|time|date|created|updated|created_at|updated_at|version|scores?|count|tokens|length|lang|language|"
    r"author|model|generator|metadata|meta|pubid|pmid|meshes|book|qtype|subject|category|topic|domain|difficulty|"
    r"parallel_tool_calls|tool_choice|context\.labels|reasoning_(required|free)_pred)$"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """Return `name` without case, underscores, hyphens and spaces."""
    return re.sub(r"[_\-\s]", "", name).lower()


@lru_cache(maxsize=4096)
def _matching(keys: tuple[str, ...], names: frozenset[str]) -> tuple[str, ...]:
    """Return those of `keys` whose plain name is one of `names`. Most rows of a data set have the same keys."""
    return tuple(key for key in keys if plain_name(str(key)) in names)


@lru_cache(maxsize=4096)
def is_metadata(path: str) -> bool:
    """Return whether the last word of a path only describes the origin of a row (`id`, `messages[].created_at`)."""
    return bool(_METADATA.search(_CAMEL.sub("_", path).lower()))


@lru_cache(maxsize=4096)
def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def is_empty(value: Any) -> bool:
    """Return whether a value is null, or an empty string, list or object."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


class Fields:
    """One object of a row, with a record of the keys that were read.

    Args:
        values (`dict[str, Any]`): the object.
        names (`dict[str, str]`, *optional*): key -> the name that the row has for it, if different.
        outer (`Fields`, *optional*): the object that contains this one; None for the row itself.
        path, where (`str`): its position in the row, without and with indices.
    """

    __slots__ = ("_all", "_opened", "_read", "bare_calls", "names", "path", "row", "turn_tools", "values", "where")

    def __init__(
        self,
        values: dict[str, Any],
        names: dict[str, str] | None = None,
        *,
        outer: Fields | None = None,
        path: str = "",
        where: str = "",
    ) -> None:
        self.values, self.names, self.path, self.where = values, names or {}, path, where
        self._read: set[str] = set()
        self._opened: set[str] = set()
        self.row = outer.row if outer is not None else self
        if outer is None:
            # (name, place) of the calls without any key of arguments; (place, value) of tools in a message
            self.bare_calls: list[tuple[str, str]] = []
            self.turn_tools: list[tuple[str, Any]] = []
            self._all: list[Fields] = []
        self.row._all.append(self)

    def get(self, name: str) -> Any:
        """Return the value of a key, which counts as read; None if it is absent."""
        self._read.add(name)
        return self.values.get(name)

    def among(self, names: frozenset[str]) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) of the keys whose plain name is one of `names` and that are not null. They count as read."""
        for key in _matching(tuple(self.values), names):
            value = self.values[key]
            if value is not None:
                self._read.add(key)
                yield key, value

    def agreed(self, names: frozenset[str], what: str) -> Any:
        """Return the value under one of `names`, ignoring empty ones; None if all are empty or absent.

        Raises:
            DataError: several values differ.
        """
        found = [(key, value) for key, value in self.among(names) if not is_empty(value)]
        for key, value in found[1:]:
            if value != found[0][1]:
                raise DataError(
                    f"{self.place(found[0][0])} and {self.place(key)} are both the {what}, and differ; keep one"
                )
        return found[0][1] if found else None

    def unread(self) -> list[str]:
        """Return the keys that were not read so far and are not null."""
        return [key for key, value in self.values.items() if value is not None and key not in self._read]

    def place(self, name: str) -> str:
        """Return the position of a key, for messages: `messages[3].role`."""
        name = self.names.get(name, name)
        return f"{self.where}.{name}" if self.where else str(name)

    def inner(self, value: dict[str, Any], name: str, index: int | None = None) -> Fields:
        """Return the object under `name`, or at `index` of the list there, to be read separately."""
        self._opened.add(name)
        path, where = _joined(self.path, self.names.get(name, name)), self.place(name)
        if index is not None:
            path, where = path + "[]", f"{where}[{index}]"
        return Fields(value, outer=self, path=path, where=where)

    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the paths that were read, and those that were not, of the row and all objects within.

        The keys of an object that was read separately stand for it.
        """
        read: dict[str, None] = {}
        ignored: dict[str, None] = {}
        for fields in self.row._all:
            for key, value in fields.values.items():
                if value is None or (key in fields._opened and not isinstance(value, str)):
                    continue
                path = _joined(fields.path, fields.names.get(key, key))
                (read if key in fields._read else ignored)[path] = None
        return tuple(read), tuple(ignored)


# --- JSON inside a row ------------------------------------------------------------------------------------------------


class _RepeatedKey(ValueError):
    """An object has a key twice: the first value would be lost."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def from_json(value: Any, where: str, invalid: str | None = None) -> Any:
    """Parse `value` if it is a string, else return it; an error begins with `invalid` instead of `where`, if given.

    Raises:
        DataError: not JSON, nested too deeply, a number of too many digits, or an object that has a key twice.
    """
    if not isinstance(value, str):
        return value
    try:
        return _DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise _reason(error, where, invalid) from error


def raw_decode(text: str, position: int, where: str, invalid: str) -> tuple[Any, int]:
    """Return the JSON value that begins at `position` of `text`, and the position after it.

    Raises:
        DataError: as `from_json`.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise _reason(error, where, invalid) from error


def to_json(value: Any, where: str) -> str:
    """Return `value` as JSON.

    Raises:
        DataError: nested too deeply, a number of too many digits, or something that JSON does not have.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} cannot be written as JSON: {error}") from error


def _reason(error: Exception, where: str, invalid: str | None) -> DataError:
    if isinstance(error, _RepeatedKey):
        return DataError(f"{where} has the key {str(error)!r} twice in one object; keep one")
    if isinstance(error, json.JSONDecodeError):
        invalid = invalid or f"{where} is a string but not valid JSON"
        return DataError(f"{invalid}: {error.msg} at column {error.colno}")
    if isinstance(error, RecursionError):
        return DataError(f"{where} is JSON nested too deeply")
    # Python refuses to convert whole numbers of more than 4,300 digits.
    return DataError(f"{where} holds a number of too many digits; write it as a string")
