"""Files of a recipe: searched beside the recipe first, then in the working directory."""

from __future__ import annotations

import os
from pathlib import Path

from eaftdrope.files import usable_path

from .suggest import nearest

_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


def find(path: str, folder: Path) -> str | None:
    """`path` as it was found: unchanged if absolute (or `~`), else in `folder` or the working directory; None if missing.

    Raises:
        ValueError: no file can have that name.
    """
    for candidate in _candidates(path, folder):
        # a loop of links, or a folder without permission to read: treated as missing
        if os.path.exists(candidate):
            return os.path.normpath(candidate)
    return None


def resolved(reference: str, folder: Path) -> str:
    """A reference to a file, a folder, a hub id or `package:NAME`; a file or folder is returned as it was found.

    Raises:
        ValueError: it is meant as a file, which does not exist.
    """
    if reference.startswith("package:"):
        return reference
    found = find(reference, folder)
    if found is None and looks_like_file(reference):
        raise ValueError(missing(reference, folder))
    return found or reference


def looks_like_file(path: str) -> bool:
    """True if a source is meant as a file rather than as `org/name` on the hub."""
    return path.startswith((".", "/", "~")) or path.endswith(_DATA_SUFFIXES) or path.count("/") > 1


def missing(path: str, folder: Path) -> str:
    """The message about a missing file: where it was searched, and the nearest names."""
    places = [str(candidate.parent) for candidate in _candidates(path, folder)]
    looked = " and ".join(dict.fromkeys(places))
    names: dict[str, None] = {}
    for place in places:
        if os.access(place, os.R_OK) and os.path.isdir(place):
            known = sorted(entry.name for entry in Path(place).iterdir() if not entry.name.startswith("."))
            prefix = path[: len(path) - len(Path(path).name)]
            names.update(dict.fromkeys(prefix + name for name in nearest(Path(path).name, known)))
    hint = f" Did you mean {' or '.join(f'`{name}`' for name in list(names)[:3])}?" if names else ""
    return f"no such file: '{path}' (looked for in {looked}).{hint}"


def _candidates(path: str, folder: Path) -> list[Path]:
    expanded = usable_path(path)
    if expanded.is_absolute():
        return [expanded]
    beside, here = folder / expanded, Path.cwd() / expanded
    return [beside] if os.path.realpath(beside) == os.path.realpath(here) else [beside, here]
