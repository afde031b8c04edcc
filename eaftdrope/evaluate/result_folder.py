"""A folder with one JSON document of results, which grows while they are measured and is never mixed with other results."""

from __future__ import annotations

import json
import os
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.paths import usable_path

_WAYS_OUT = "Nothing was touched: name another folder with --output, or pass --overwrite to delete it and start anew."


class ResultFolder:
    """Making one only looks; `write` and `save` are the first to touch anything.

    Args:
        name: the document's file.
        what: what error messages call the results ("a probe").
        settings: what decides the results, as JSON; a document with others is not gone on with.
        overwrite: the document there is replaced, whatever its settings.

    Attributes:
        document: the document that is gone on with; None where there is none, or it is to be replaced.

    Raises:
        UserError: the folder holds other results or strangers' files, or cannot be written to.
    """

    def __init__(self, folder: Path, name: str, what: str, settings: dict, *, schema: int, overwrite: bool = False):
        usable_path(folder)
        self.folder, self.name = folder, name
        self._check_writable()
        if not (folder / name).is_file() and not self._is_free():
            raise UserError(
                f"{folder} is not empty and holds no {name} of ours. Nothing was touched: name another folder with --output."
            )
        self.document = None if overwrite else self._read(schema)
        if self.document is not None and self.document["settings"] != settings:
            keys = _differences(self.document["settings"], settings)
            raise UserError(f"{folder} holds {what} with other settings (different: {keys}). {_WAYS_OUT}")

    def write(self, name: str, text: str) -> Path:
        """A small file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / name)
        return self.folder / name

    def save(self) -> None:
        """The document as it is now."""
        self.write(self.name, json.dumps(self.document) + "\n")

    def _read(self, schema: int) -> dict | None:
        file = self.folder / self.name
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        whole = isinstance(document, dict) and isinstance(document.get("settings"), dict)
        if not whole or document.get("schema") != schema:
            raise UserError(f"{file} cannot be read as results of this version. {_WAYS_OUT}")
        return document

    def _is_free(self) -> bool:
        return not self.folder.exists() or all(entry.name == f".{self.name}.partial" for entry in self.folder.iterdir())

    def _check_writable(self) -> None:
        place = self.folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            why = "no permission to write in" if place.is_dir() else "this is a file:"
            raise UserError(f"--output {self.folder} cannot be made: {why} {place}. Name another folder.")


def _differences(old: dict, new: dict) -> str:
    """Dotted keys whose values differ."""

    def flat(data, prefix=""):
        if isinstance(data, list) and data and isinstance(data[0], dict):
            data = {str(item.get("name")): item for item in data if isinstance(item, dict)}
        if isinstance(data, dict):
            return {key: value for name in data for key, value in flat(data[name], f"{prefix}{name}.").items()}
        return {prefix[:-1]: data}

    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
