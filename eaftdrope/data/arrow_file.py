"""Rows of tokens in an Arrow file: constant memory while it is written, a memory map afterwards. Blocks of one length.

Blocks are for pretraining ("wrapped"): each document ends in the end-of-sequence token, all of them form one row of
tokens, and that is cut every `length` tokens. Nothing is padded; only the last, incomplete block is lost.

TRL's `pack_dataset(strategy="wrapped")` does the same to a table in memory; in batches it leaves a short row at the end of
each, and it forgets the boundaries of the documents. Here the rows stream, and `seq_lengths` keeps the boundaries.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from eaftdrope.errors import DataError

from .encoding import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

WEIGHTS = "token_weights"
"""The column of the weights of the tokens (`weights.py`), as the trainer reads it."""
# A batch is written when it has this many rows, or tokens: rows of text can be whole books.
_ROWS, _TOKENS = 1000, 1_000_000
_PREFIX, _LOCK = "eaftdrope-data-", "in_use"
# the system releases these locks when the process ends, however it ends
_held: list[FileLock] = []


def write_rows(rows: Iterator[dict[str, Any]], columns: tuple[str, ...]) -> Dataset:
    """Write rows of tokens to an Arrow file and return it as a dataset; the file lives as long as this process.

    Args:
        rows (`Iterator[dict]`): the rows; `input_ids` is required.
        columns (`tuple[str, ...]`): their columns; `origin` is text, `token_weights` a list of numbers or None, any other a
            list of whole numbers.
    """
    import pyarrow as pa
    from datasets import Dataset

    numbers = pa.list_(pa.int32())
    types = {"origin": pa.string(), WEIGHTS: pa.list_(pa.float32())}
    schema = pa.schema({name: types.get(name, numbers) for name in columns})
    path = str(_own_folder() / "rows.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        batch: list[dict[str, Any]] = []
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
    """Create a temporary folder for this process.

    It is deleted at the end or, if the process is killed, by the next process that creates one.
    """
    _remove_stale()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # The lock has another name until it is held: an unlocked one is nobody's. A disk without locks keeps its folders.
    unlocked = folder / f".{_LOCK}"
    lock = FileLock(unlocked)
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire(blocking=False)
        _held.append(lock)
        unlocked.rename(folder / _LOCK)
    return folder


def _remove_stale() -> None:
    """Delete the folders of processes that have ended: their locks are free, on this machine and in its containers alike.

    Folders without a lock are those of older versions, and may be in use.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not (folder / _LOCK).is_file():
            continue
        with contextlib.suppress(OSError, NotImplementedError), FileLock(folder / _LOCK).acquire(blocking=False):
            shutil.rmtree(folder, ignore_errors=True)


# --- blocks of one length ---------------------------------------------------------------------------------------------

# rows can be whole books
_BATCH = 16


def text_blocks(rows: Dataset, *, length: int, eos: int | None, boundaries: bool = False) -> Dataset:
    """Cut the rows of `build_dataset`, in their order, into blocks of `length` tokens.

    The end-of-sequence token is added to a row that does not end in it (text does not, a conversation rarely); it is trained
    if the row's last token is.

    Args:
        rows (`Dataset`): with `input_ids` and `labels`, and `token_weights` if tokens have weights.
        length (`int`): tokens per block.
        eos (`int`, *optional*): the end-of-sequence token.
        boundaries (`bool`): add `seq_lengths`: the tokens of each (part of a) document in the block, as TRL's collator reads
            them.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or there are not enough tokens for one block.
    """
    if eos is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so documents cannot be told apart. Set `eos_token` in its "
            "tokenizer_config.json."
        )
    names = ["input_ids", "labels", *([WEIGHTS] if WEIGHTS in rows.column_names else [])]
    columns = (*names, *(["seq_lengths"] if boundaries else []))
    blocks = write_rows(_blocks(_documents(rows, names, eos), names, length, boundaries), columns)
    if len(blocks) == 0:
        tokens = sum(len(document[0]) for document in _documents(rows, names, eos))
        raise DataError(
            f"the text has {tokens:,} tokens, not enough for one block of {length}. Bring more text, or lower max_length."
        )
    return blocks


def _documents(rows: Dataset, names: list[str], eos: int) -> Iterator[list[list[Any]]]:
    """Yield the columns of each row, with the end-of-sequence token."""
    for batch in rows.select_columns(names).iter(_BATCH):
        for ids, labels, *weights in zip(*(batch[name] for name in names), strict=True):
            if not ids or ids[-1] != eos:
                trained = not labels or labels[-1] != IGNORED
                ids, labels = [*ids, eos], [*labels, eos if trained else IGNORED]
                weights = [[*values, abs(values[-1]) if values else 1.0] for values in weights]
            yield [ids, labels, *weights]


def _blocks(
    documents: Iterable[list[list[Any]]], names: list[str], length: int, boundaries: bool
) -> Iterator[dict[str, Any]]:
    """Yield complete blocks; a document that does not fit continues in the next one, as a part of its own."""
    block: list[list[Any]] = [[] for _ in names]
    parts: list[int] = []
    for document in documents:
        start, size = 0, len(document[0])
        while start < size:
            end = min(size, start + length - len(block[0]))
            for column, values in zip(block, document, strict=True):
                column += values[start:end]
            parts.append(end - start)
            start = end
            if len(block[0]) == length:
                yield {**dict(zip(names, block, strict=True)), **({"seq_lengths": parts} if boundaries else {})}
                block, parts = [[] for _ in names], []
