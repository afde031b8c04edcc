"""The texts that probes read: plain text, JSONL rows with a `text` field, or the shipped text.

`evenly_spaced` chooses the rows of a probe that has a limit: the same ones before and after, in every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import TypeVar

from eaftdrope.errors import DataError

SHIPPED = "news_from_nowhere.txt"
_Item = TypeVar("_Item")


def read_texts(file: Path, reader: str) -> list[str]:
    """Return the documents of a file: each row's `text` of a .jsonl, else the whole file. `reader` appears in errors.

    Raises:
        DataError: a line is not a JSON object with `text`.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return [text]
    texts = []
    for place, row in json_lines(text, file):
        if not isinstance(row.get("text"), str):
            raise DataError(
                f"{place}: no `text`. {reader[0].upper()}{reader[1:]} reads JSONL rows with a `text` field."
            )
        texts.append(row["text"])
    return texts


def json_lines(text: str, file: Path) -> Iterator[tuple[str, dict]]:
    """Yield (file:line, object) of every line that is not empty.

    Raises:
        DataError: a line is not a JSON object.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: expected a JSON object.")
        yield f"{file}:{number}", row


def shipped_text() -> str:
    """Return the opening of a novel of 1890, in the public domain: some 9,700 words."""
    return asset(SHIPPED)


def asset(name: str) -> str:
    """Return the text of a file that eaftdrope ships."""
    return (package_files("eaftdrope.evaluate") / "assets" / name).read_text(encoding="utf-8")


def evenly_spaced(items: Sequence[_Item], limit: int | None) -> list[_Item]:
    """Return at most `limit` of `items`, evenly spaced from the first on, in order (None: all)."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]
