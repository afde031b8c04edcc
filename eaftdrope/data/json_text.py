"""JSON inside a row: strings that hold messages, tools or calls, and structured results that become text."""

from __future__ import annotations

import json
from typing import Any

from eaftdrope.errors import DataError


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
    """`value` parsed if it is a string, else as it is; `invalid` is what an error begins with in place of `where`.

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
    """The JSON value that begins at `position` of `text`, and the position behind it.

    Raises:
        DataError: as `from_json`.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise _reason(error, where, invalid) from error


def to_json(value: Any, where: str) -> str:
    """`value` as JSON.

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
