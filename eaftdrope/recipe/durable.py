"""Files that are on the disk when the call returns, and not only in the system's cache: a power cut does not lose them."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(file: Path, text: str) -> None:
    """A small file, whole or not at all: written beside its place, flushed, and renamed."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(partial, file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Waits until the system has written a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """`flush` for every file and folder in `folder`, but for entries of its top with these names."""
    for entry in sorted(folder.iterdir()):
        if entry.name in without or entry.is_symlink():
            continue
        if entry.is_dir():
            flush_tree(entry)
        elif entry.is_file():
            flush(entry)
    flush(folder)
