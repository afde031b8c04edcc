"""Reading what a folder holds: JSON documents and lines of JSON, of a run that may still be going on."""

from __future__ import annotations

import json
from pathlib import Path

from eaftdrope.errors import UserError


def read_json(path: Path) -> dict | list | None:
    """The document; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON document ({error}), so no report can be made of it.") from None


def read_lines(path: Path) -> list[dict]:
    """A document a line, none where there is no such file. A last line that is still being written is left out."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{path} has a line that is no JSON document ({error}), so no report can be made of it."
        ) from None
