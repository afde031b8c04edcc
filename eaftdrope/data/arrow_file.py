"""Rows of tokens to an Arrow file: constant memory while it is written, a memory map afterwards."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# A batch is written when it has this many rows, or tokens: rows of text can be whole books.
_ROWS, _TOKENS = 1000, 1_000_000


def write_rows(rows: Iterator[dict[str, object]], columns: tuple[str, ...]) -> Dataset:
    """A dataset of `rows`, which have these columns (`origin` is text, any other a list of whole numbers, `input_ids`
    among them). Its file lives as long as this process."""
    import pyarrow as pa
    from datasets import Dataset

    numbers = pa.list_(pa.int32())
    schema = pa.schema({name: pa.string() if name == "origin" else numbers for name in columns})
    folder = tempfile.mkdtemp(prefix="eaftdrope-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "rows.arrow")
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
