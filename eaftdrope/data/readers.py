"""The rows of one file: JSON Lines, a JSON array, CSV or Parquet, each with its position.

- JSON is read here, never through Arrow: an Arrow schema null-fills nested `tools` and cannot hold `arguments` whose types
  differ from row to row.
- A row that cannot be read is yielded as a `Row` with `error` set, so that the caller can stop or skip; a fault of the
  whole file is a DataError. Nothing in a file is skipped silently.
- Every row has another origin: `file:line`, and `file:line (row n)` from the second row of a line on.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaftdrope.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row as read. `origin` is its unique position in the source; `error` is why `data` is empty."""

    data: dict[str, Any]
    origin: str
    error: str | None = None


def iter_file(path: Path, shown: str) -> Iterator[Row]:
    """Yield the rows of the file `path`, whose origins begin with `shown`.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _iter_parquet(path, shown)
    elif suffix == ".csv":
        yield from _iter_csv(path, shown)
    elif suffix == ".json" and _starts_with_bracket(path):
        yield from _iter_json_array(path, shown)
    else:
        if suffix == ".json":
            _refuse_one_object(path, shown)
        yield from _iter_json_lines(path, shown)


def drop_nulls(value: Any) -> Any:
    """Return `value` without the None fields of its dicts: Arrow fills the union of all rows' nested fields with nulls."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


# --- JSON -------------------------------------------------------------------------------------------------------------


class _RepeatedKey(ValueError):
    """A JSON object has a key twice: either value would be a guess."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise _RepeatedKey(f"the key {_quoted(names)} occurs more than once in an object; leave one of them")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _reason(error: ValueError | RecursionError, place: str) -> str:
    """Return why JSON cannot be read; `place` is the unit of a syntax error's position ("column", "line")."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        where = error.colno if place == "column" else error.lineno
        return f"not valid JSON: {error.msg} at {place} {where}"
    if isinstance(error, _RepeatedKey):
        return str(error)
    # Python's limit on the digits of a whole number
    return "not valid JSON: a number has too many digits; write it as a string"


def _iter_json_lines(path: Path, shown: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _parse_line(raw.removeprefix(_BOM).rstrip(b"\r\n"), f"{shown}:{number}")


def _parse_line(raw: bytes, origin: str) -> Row:
    try:
        data = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row({}, origin, f"not valid UTF-8 at byte {error.start} of the line; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and raw.lstrip().startswith(b"{"):
            return Row({}, origin, f"not one JSON object: more follows at column {error.colno}; write one row per line")
        return Row({}, origin, _reason(error, "column"))
    return _as_row(data, origin, escapes=b"\\u" in raw)


def _as_row(data: Any, origin: str, *, escapes: bool) -> Row:
    if not isinstance(data, dict):
        return Row({}, origin, f"a row must be a JSON object with named fields, this is a {type(data).__name__}")
    if escapes and not _is_text(data):
        return Row(
            {},
            origin,
            "half of a surrogate pair (\\ud800 to \\udfff) is not a character; write both halves, or neither",
        )
    return Row(data, origin)


def _is_text(data: Any) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            if line := line.removeprefix(_BOM).strip():
                return line.startswith(b"[")
    return False


def _refuse_one_object(path: Path, shown: str) -> None:
    """Refuse a `.json` file that is neither an array nor JSON Lines: one object over several lines."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"{}")
    if _parse_line(first.removeprefix(_BOM).rstrip(b"\r\n"), shown).error is None:
        return
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return
    raise DataError(
        f"{shown}: the file holds one {type(whole).__name__}, not rows. Write an array of rows, or one row per line"
        + (
            f" (here perhaps what stands under {', '.join(map(repr, list(whole)[:5]))})."
            if isinstance(whole, dict)
            else "."
        )
    )


def _iter_json_array(path: Path, shown: str) -> Iterator[Row]:
    """Yield the elements of one JSON array, each with its first line, and its number if a line has several."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}: not valid UTF-8 at byte {error.start}. Save the file as UTF-8.") from error
    start = text.index("[")
    position, line, previous = start + 1, 1 + text.count("\n", 0, start), None
    for number, (begins, ends, data) in enumerate(_elements(text, position), start=1):
        line, position = line + text.count("\n", position, begins), begins
        origin = f"{shown}:{line}" if line != previous else f"{shown}:{line} (row {number})"
        previous = line
        if isinstance(data, str):
            yield Row({}, origin, data)
        else:
            (element,) = data
            yield _as_row(element, origin, escapes="\\u" in text[begins:ends])


def _elements(text: str, position: int) -> Iterator[tuple[int, int, tuple[Any] | str]]:
    """Yield (begin, end, (element,)) of the array whose elements begin at `position`.

    If the array does not end well, the last item is (begin, end of the text, what is wrong): the text after a broken element
    cannot be separated from it.
    """
    between, blank = re.compile(r"[\s,]*"), re.compile(r"\s*")
    while True:
        begins = _after(between, text, position)
        if text.startswith("]", begins):
            rest = _after(blank, text, begins + 1)
            if rest < len(text):
                yield rest, len(text), "more follows the array; write one array, or one row per line (.jsonl)"
            return
        try:
            data, position = _DECODER.raw_decode(text, begins)
        except _RepeatedKey as error:
            # still JSON: the element can be skipped, and the rest of the file read
            _, position = json.JSONDecoder().raw_decode(text, begins)
            yield begins, position, str(error)
            continue
        except (ValueError, RecursionError) as error:
            yield begins, len(text), f"{_reason(error, 'line')}; the rest of the file is not read"
            return
        yield begins, position, (data,)


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    """Return the end of a match at `position` of a pattern that also matches the empty string."""
    found = pattern.match(text, position)
    assert found is not None
    return found.end()


# --- tables -----------------------------------------------------------------------------------------------------------


def _iter_csv(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            # A quoted field may hold line breaks: the row starts on the line after the last one read.
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"{shown}: not valid UTF-8 from line {line} on. Save the file as UTF-8.") from error
            except csv.Error as error:
                if header is None:
                    raise DataError(f"{shown}: the header is not valid CSV: {error}.") from error
                yield Row({}, f"{shown}:{line}", f"not valid CSV: {error}")
                continue
            if header is None:
                header = fields
                _refuse_repeated(header, shown, "the header")
                if not header:
                    raise DataError(f"{shown}: the first line is empty; it must name the columns.")
            elif fields:
                yield _csv_row(header, fields, f"{shown}:{line}")


def _csv_row(header: list[str], fields: list[str], origin: str) -> Row:
    if len(fields) != len(header):
        advice = "; quote fields with commas" if len(fields) > len(header) else ""
        return Row({}, origin, f"{len(fields)} fields, but the header names {len(header)}{advice}")
    # An empty CSV field is an absent value, as usual in CSV.
    return Row({name: value for name, value in zip(header, fields) if value != ""}, origin)


def _iter_parquet(path: Path, shown: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _refuse_repeated_columns(file.schema_arrow, shown)
            for batch in file.iter_batches(batch_size=256):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(drop_nulls(data), f"{shown}:{number}")
    except DataError:
        raise
    # pyarrow raises OSError for a damaged page, and decodes text as it is asked for
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: cannot be read as Parquet after row {number}: {error}") from error


def _refuse_repeated_columns(columns: Iterable[Any], shown: str, where: str = "the file") -> None:
    """Refuse repeated names in a schema and in the structs in it."""
    import pyarrow as pa

    columns = list(columns)
    _refuse_repeated([column.name for column in columns], shown, where)
    for column in columns:
        kind = column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _refuse_repeated_columns(kind, shown, f"the column {column.name!r}")


def _refuse_repeated(names: Iterable[str], shown: str, where: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(
            f"{shown}: {where} names {_quoted(repeated)} more than once, so which value counts would be a guess. "
            "Rename one, or remove it."
        )


def _quoted(names: list[str]) -> str:
    return " and ".join(map(repr, names))
