"""Where rows come from: local files, folders, hub datasets, and the function-calling data of a pip package.

- Local JSON Lines are read line by line by us, never through Arrow: an Arrow schema null-fills nested `tools` and cannot
  hold `arguments` whose types differ from row to row. It also gives every row its file and line, in constant memory.
- A row that cannot be read does not end the iteration: it comes as a `Row` with `error` set, so that the caller can
  stop or skip.
- `check_source` is for validation before anything is loaded: standard library only.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaftdrope.data import bfcl
from eaftdrope.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
BFCL = "package:bfcl"
_SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Args:
        path (`str`): local `.jsonl`, `.json`, `.parquet` or `.csv` file, folder of such files, dataset id on the hub
            (`org/name`), or `package:bfcl`.
        weight (`float`, *optional*, defaults to `1.0`): expected repetitions of the source's rows in the mixture: 2.0
            takes every row twice, 0.5 takes half of the rows (chosen by the seed), 1.5 every row and half of them again.
        split (`str`, *optional*, defaults to `"train"`): split of a hub dataset or of `package:bfcl`; for a folder, the
            files named after the split (`test.jsonl`, `test-0001.parquet`).
        limit (`int`, *optional*): read only the first `limit` rows, before the weight applies.
        name (`str`, *optional*): configuration name of a hub dataset.
        reasoning (`bool`, *optional*, defaults to `True`): keep what the assistant thinks before it answers.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    limit: int | None = None
    name: str | None = None
    reasoning: bool = True

    def __str__(self) -> str:
        is_plain = self.split == "train" and self.name is None
        return self.path if is_plain else f"{self.path}[{':'.join(filter(None, (self.name, self.split)))}]"


@dataclass(frozen=True)
class Row:
    """One row as read. `origin` is `file:line` or `hub-id[split]:index`; `error` says why `data` is empty."""

    data: dict[str, Any]
    origin: str
    error: str | None = None


def check_source(source: Source) -> str | None:
    """What is wrong with `source`, and what to do about it, or None. Reads no row and imports nothing heavy.

    A hub dataset id is only checked for its form: whether it exists is known when it is loaded.
    """
    if not source.weight > 0 or source.weight == float("inf"):
        return f"{source.path}: the weight is {source.weight:g}; it must be a number above 0 (1.0 takes each row once)."
    if source.limit is not None and source.limit < 1:
        return f"{source.path}: the limit is {source.limit}; it must be at least 1, or left out to take all rows."
    if source.path.startswith("package:"):
        if source.path != BFCL:
            return f"{source.path}: no such data package. The one known is {BFCL!r}."
        return bfcl.check(source.split)
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            _folder_files(path, source.split)
            return None
        if path.is_file():
            return _check_file(path, source)
    except DataError as error:
        return str(error)
    if _looks_local(source.path):
        return _missing_file(source.path, path)
    return None


def iter_rows(source: Source) -> Iterator[Row]:
    """The rows of `source` in their own order, at most `source.limit`, weight not applied, in constant memory.

    (A `.json` file that holds one array is the exception: it is read whole.)

    Raises:
        DataError: the source as a whole cannot be read. A single unreadable row is yielded with `error` set.
    """
    problem = check_source(source)
    if problem is not None:
        raise DataError(problem)
    rows = _iter_all(source)
    if source.limit is None:
        yield from rows
        return
    for _, row in zip(range(source.limit), rows):
        yield row


def _iter_all(source: Source) -> Iterator[Row]:
    if source.path == BFCL:
        for index, data in enumerate(bfcl.rows(source.split)):
            yield Row(data, f"{BFCL}[{source.split}]:{index} ({data['id']})")
        return
    path = Path(source.path).expanduser()
    if path.is_dir():
        for file in _folder_files(path, source.split):
            yield from _iter_file(file, str(file))
    elif path.is_file():
        yield from _iter_file(path, source.path)
    else:
        yield from _iter_hub(source)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_file(path: Path, source: Source) -> str | None:
    if path.suffix.lower() not in SUFFIXES:
        return (
            f"{source.path}: files of type {path.suffix or 'without suffix'!r} are not read. "
            f"Convert it to one of {', '.join(SUFFIXES)} (one JSON object a line is the simplest)."
        )
    if source.split != "train" or source.name is not None:
        return f"{source.path}: a file has no splits or configurations. Name the file itself, and leave out split and name."
    if not os.access(path, os.R_OK):
        return f"{source.path}: the file cannot be read (permission denied). Check its permissions."
    if path.stat().st_size == 0:
        return f"{source.path}: the file is empty."
    return None


def _folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of `folder` for `split`, sorted: files named after the split, or all if no file names any split."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(
            f"{folder}: the folder holds no {', '.join(SUFFIXES)} file. Name a file, or put the data there."
        )
    of_split = {name: [file for file in files if re.match(rf"{name}\b|{name}_", file.name)] for name in _SPLIT_NAMES}
    if of_split.get(split):
        return of_split[split]
    if split == "train" and not any(of_split.values()):
        return files
    raise DataError(
        f"{folder}: no file of the folder is named after the split {split!r} "
        f"(files: {_listing(file.name for file in files)}). Name a file, or change the split."
    )


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a local one, rather than as a dataset id on the hub."""
    if path.lower().endswith((*SUFFIXES, ".txt", ".gz", ".zip", ".tsv", ".yaml")) or not _HUB_ID.fullmatch(path):
        return True
    return "/" not in path and bool(_close_names(Path(path)))


def _missing_file(given: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{given}: no such file; the folder {str(folder)!r} does not exist either. Check the path."
    close = _close_names(path)
    if close:
        return f"{given}: no such file. Did you mean {' or '.join(repr(str(folder / name)) for name in close)}?"
    names = [file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    found = f"Data files there: {_listing(names)}." if names else "There is no data file in that folder."
    return f"{given}: no such file. {found} A dataset on the hub is written org/name."


def _close_names(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    names = [file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES]
    by_lower = {name.lower(): name for name in names} | {Path(name).stem.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), by_lower, n=3, cutoff=0.75)
    return list(dict.fromkeys(by_lower[name] for name in close))[:2]


def _listing(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- readers ----------------------------------------------------------------------------------------------------------


def _iter_file(path: Path, shown: str) -> Iterator[Row]:
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


def _iter_json_lines(path: Path, shown: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _parse_json(raw.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"), f"{shown}:{number}")


def _parse_json(raw: bytes, origin: str) -> Row:
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row({}, origin, f"not valid UTF-8 at byte {error.start} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Row({}, origin, f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError:
        # Python refuses to convert whole numbers of more than 4,300 digits.
        return Row({}, origin, "a number of too many digits; write it as a string")
    except RecursionError:
        return Row({}, origin, "JSON nested too deeply")
    return _as_row(data, origin)


def _as_row(data: Any, origin: str) -> Row:
    if not isinstance(data, dict):
        return Row({}, origin, f"a row must be a JSON object with named fields, this is a {type(data).__name__}")
    return Row(data, origin)


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _refuse_one_object(path: Path, shown: str) -> None:
    """A `.json` file that is neither an array nor JSON Lines: one object over several lines."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"{}")
    if _parse_json(first.removeprefix(b"\xef\xbb\xbf"), shown).error is None:
        return
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return
    raise DataError(
        f"{shown}: the file holds one {type(whole).__name__}, not rows. Write an array of rows, or one row a line"
        + (
            f" (here perhaps what stands under {', '.join(map(repr, list(whole)[:5]))})."
            if isinstance(whole, dict)
            else "."
        )
    )


def _iter_json_array(path: Path, shown: str) -> Iterator[Row]:
    """The elements of one JSON array, each with the line it starts on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}: not valid UTF-8 at byte {error.start}. Save the file as UTF-8.") from error
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = blank.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            data, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # What follows a broken element cannot be told apart from it, so the rest of the file is one bad row.
            reason = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            yield Row({}, f"{shown}:{line}", f"not valid JSON: {reason}; the rest of the file is not read")
            return
        yield _as_row(data, f"{shown}:{line}")


def _iter_csv(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            # A quoted field may hold line breaks: the row starts on the line after the last one read.
            before = reader.line_num
            try:
                data = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row({}, f"{shown}:{max(before, 1) + 1}", f"not valid CSV: {error}")
                continue
            except UnicodeDecodeError as error:
                raise DataError(f"{shown}: not valid UTF-8 after line {before}. Save the file as UTF-8.") from error
            yield _csv_row(data, f"{shown}:{max(before, 1) + 1}", len(reader.fieldnames or ()))


def _csv_row(data: dict[str | None, Any], origin: str, fields: int) -> Row:
    if None in data:
        return Row(
            {}, origin, f"{fields + len(data[None])} fields, but the header names {fields}; quote fields with commas"
        )
    missing = [name for name, value in data.items() if value is None]
    if missing:
        return Row({}, origin, f"{fields - len(missing)} fields, but the header names {fields}")
    # An empty CSV field is an absent value, as everywhere else in the world of CSV.
    return Row({name: value for name, value in data.items() if value != ""}, origin)


def _iter_parquet(path: Path, shown: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(drop_nulls(data), f"{shown}:{number}")
    except pa.ArrowException as error:
        raise DataError(f"{shown}: cannot be read as Parquet after row {number}: {error}") from error


def _iter_hub(source: Source) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(source.path, name=source.name, split=source.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source}: the dataset cannot be loaded from the hub: {error}\n"
            f"Check its id, split and configuration name, the network (HF_HUB_OFFLINE is "
            f"{os.environ.get('HF_HUB_OFFLINE', 'not set')}), or download it and name the local file."
        ) from error
    where = ":".join(filter(None, (source.name, source.split)))
    for index, data in enumerate(dataset):
        yield Row(drop_nulls(data), f"{source.path}[{where}]:{index}")


def drop_nulls(value: Any) -> Any:
    """`value` without the None fields of its dicts: Arrow fills the union of all rows' nested fields with nulls."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value
