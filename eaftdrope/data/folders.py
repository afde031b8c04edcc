"""Which files of a folder are read, subfolders included, and which are not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eaftdrope.errors import DataError

from .readers import SUFFIXES

_SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)(\b|_)", re.IGNORECASE)
# beside the rows of a dataset, never rows themselves
_ABOUT = re.compile(r"_[A-Z]|_(common_)?metadata$|(readme|license|notice|changelog)\b", re.IGNORECASE)
_HIDDEN_FOLDER = re.compile(r"\.|__|_temporary$")


@dataclass(frozen=True)
class FolderFiles:
    """`read`: the files whose rows are read, in order; `left_out`: what else there is, in one line, or None."""

    read: list[Path]
    left_out: str | None


def folder_files(folder: Path, split: str) -> FolderFiles:
    """The data files of `folder` and its subfolders for `split`, sorted: those that are named after the split (or lie in a
    folder that is), or all if none is named after any split. Each file is read once, also where links lead to it again.

    Hidden files are not read; these, and what lies beside the rows of a dataset (README, LICENSE, _SUCCESS), are not
    mentioned.

    Raises:
        DataError: there is no such file, a link leads nowhere, or a subfolder cannot be read.
    """
    files, others, empty, again = [], [], [], []
    seen: dict[str, Path] = {}
    for path in _walk(folder):
        if path.suffix.lower() not in SUFFIXES:
            if not _ABOUT.match(path.name):
                others.append(path)
            continue
        if path.is_file() and not os.access(path, os.R_OK):
            raise DataError(f"{path}: the file cannot be read (permission denied). Check its permissions.")
        if not path.is_file():
            raise DataError(f"{path}: a link that leads nowhere, or no file. Remove it, or put the file there.")
        real = os.path.realpath(path)
        if real in seen:
            again.append(path)
        elif path.stat().st_size == 0:
            empty.append(path)
        else:
            files.append(path)
        seen.setdefault(real, path)
    if not files:
        holds = f" It holds {listing(_below(folder, [*others, *empty]))}." if others or empty else ""
        rows = " with rows" if empty else ""
        raise DataError(
            f"{folder}: the folder holds no {', '.join(SUFFIXES)} file{rows}.{holds} Name a file, or put the data there."
        )
    chosen, unnamed = _of_split(folder, files, split)
    notes = [
        (others, f"not of a type that is read ({', '.join(SUFFIXES)})"),
        (empty, "empty"),
        (again, "links to a file that is read already"),
        (unnamed, f"not named after a split, as others are ({split!r} is read)"),
    ]
    parts = [f"{listing(_below(folder, paths))}: {what}" for paths, what in notes if paths]
    return FolderFiles(chosen, f"{folder}: files that are not read: {'; '.join(parts)}." if parts else None)


def listing(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _walk(folder: Path) -> list[Path]:
    """All that is no folder below `folder` and not hidden, sorted; a folder that links lead to is entered once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}). Check its permissions.")

    found, entered = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not _HIDDEN_FOLDER.match(name))
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[Path]]:
    """(files of the split, files of no split while others are of one)."""
    of_split: dict[str | None, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split(file.relative_to(folder)), []).append(file)
    unnamed = of_split.pop(None, [])
    if split in of_split:
        return of_split[split], unnamed
    if split == "train" and not of_split:
        return unnamed, []
    raise DataError(
        f"{folder}: no file of the folder is named after the split {split!r} "
        f"(files: {listing(_below(folder, files))}). Name a file, or change the split."
    )


def _split(path: Path) -> str | None:
    """The split that a file is named after, or else the innermost of its folders that is named after one."""
    found = (_SPLIT.match(part) for part in reversed(path.parts))
    return next((match[1].lower() for match in found if match), None)


def _below(folder: Path, paths: Iterable[Path]) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]
