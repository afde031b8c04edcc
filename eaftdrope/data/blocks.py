"""Documents to blocks of one length, as pretraining packs them ("wrapped"): each document ended by the end-of-sequence
token, all of them in one row of tokens, cut every `length` tokens. Nothing is padded; what is lost is the last block,
where it is not full.

TRL's `pack_dataset(strategy="wrapped")` does the same to a table in memory; read in batches it leaves a short row at the
end of each, and it forgets where the documents were. Here the rows stream, and `seq_lengths` remembers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from eaftdrope.errors import DataError

from .arrow_file import write_rows
from .encoding import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

# rows can be whole books
_BATCH = 16


def text_blocks(rows: Dataset, *, length: int, eos: int | None, boundaries: bool = False) -> Dataset:
    """Blocks of `length` tokens of the `rows` of `build_dataset`, in their order: columns `input_ids`, `labels` and, with
    `boundaries`, `seq_lengths`: the tokens of each (part of a) document in the block, as TRL's collator reads them.

    The end-of-sequence token is added where a row does not end in it (text does, a conversation rarely); it is trained
    where the row's last token is.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or there are not enough tokens for one block.
    """
    if eos is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so documents cannot be told apart. Set `eos_token` in its "
            "tokenizer_config.json."
        )
    columns = ("input_ids", "labels", *(["seq_lengths"] if boundaries else []))
    blocks = write_rows(_blocks(_documents(rows, eos), length, boundaries), columns)
    if len(blocks) == 0:
        tokens = sum(len(ids) for ids, _ in _documents(rows, eos))
        raise DataError(
            f"the text has {tokens:,} tokens, not enough for one block of {length}. Bring more text, or lower max_length."
        )
    return blocks


def _documents(rows: Dataset, eos: int) -> Iterator[tuple[list[int], list[int]]]:
    for batch in rows.select_columns(["input_ids", "labels"]).iter(_BATCH):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if not ids or ids[-1] != eos:
                trained = not labels or labels[-1] != IGNORED
                ids, labels = [*ids, eos], [*labels, eos if trained else IGNORED]
            yield ids, labels


def _blocks(documents: Iterable[tuple[list[int], list[int]]], length: int, boundaries: bool) -> Iterator[dict]:
    """Full blocks; a document that does not fit goes on in the next one, as a part of its own."""
    ids: list[int] = []
    labels: list[int] = []
    parts: list[int] = []
    for document, document_labels in documents:
        start = 0
        while start < len(document):
            end = min(len(document), start + length - len(ids))
            ids += document[start:end]
            labels += document_labels[start:end]
            parts.append(end - start)
            start = end
            if len(ids) == length:
                yield {"input_ids": ids, "labels": labels, **({"seq_lengths": parts} if boundaries else {})}
                ids, labels, parts = [], [], []
