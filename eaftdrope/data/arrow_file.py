"""Rows of tokens to an Arrow file: constant memory while it is written, a memory map afterwards."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# A batch is written when it has this many rows, or tokens: rows of text can be whole books.
_ROWS, _TOKENS = 1000, 1_000_000
_PREFIX, _LOCK = "eaftdrope-data-", "in_use"
# open files of the locks: the system lets go of them when the process ends, however it ends
_held: list[int] = []


def write_rows(rows: Iterator[dict[str, object]], columns: tuple[str, ...]) -> Dataset:
    """A dataset of `rows`, which have these columns (`origin` is text, any other a list of whole numbers, `input_ids`
    among them). Its file lives as long as this process."""
    import pyarrow as pa
    from datasets import Dataset

    numbers = pa.list_(pa.int32())
    schema = pa.schema({name: pa.string() if name == "origin" else numbers for name in columns})
    path = str(_own_folder() / "rows.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        batch: list[dict[str, object]] = []
        tokens = 0
        for row in rows:
            batch.append(row)
            tokens += len(row["input_ids"])
            if len(batch) == _ROWS or tokens >= _TOKENS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()
                tokens = 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return Dataset.from_file(path)


def _own_folder() -> Path:
    """A temporary folder for this process. It is deleted at the end, or, if the process is killed, by the next that makes
    one."""
    _remove_stale()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # It has another name until it is locked: one that is found unlocked is nobody's. A disk without locks keeps folders.
    unlocked = folder / f".{_LOCK}"
    with contextlib.suppress(OSError, ImportError):
        _held.append(_lock(unlocked, os.O_CREAT))
        unlocked.rename(folder / _LOCK)
    return folder


def _remove_stale() -> None:
    """Deletes the folders of processes that are gone, on this machine and in its containers alike: their locks are free.
    Folders without a lock are of older versions, and may be in use."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ImportError):
            descriptor = _lock(folder / _LOCK)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(file: Path, flags: int = 0) -> int:
    """The descriptor of a file that is locked for this process.

    Raises:
        OSError: it is not there, another process holds it, or its disk has no locks.
        ImportError: the system has no flock.
    """
    import fcntl

    descriptor = os.open(file, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
