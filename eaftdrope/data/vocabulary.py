"""Encoded rows against the model's embedding: a token that the model has no row for ends in an index error once it is
trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def check_token_ids(rows: Dataset, size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Looks for the largest token of all rows (`input_ids`), and at the one they are padded with.

    Args:
        size: rows of the model's embedding, `vocab_size` of its configuration.

    Raises:
        DataError: a token id of at least `size`; names the first such row and the token.
    """
    import pyarrow.compute as pc

    pad = None if tokenizer is None else tokenizer.pad_token_id
    if pad is not None and pad >= size:
        raise DataError(f"batches are padded with {_beyond(pad, size, tokenizer)}")
    first = 0
    for batch in rows.select_columns("input_ids").with_format("arrow").iter(10_000):
        most = pc.max(pc.list_flatten(batch["input_ids"])).as_py()
        if most is not None and most >= size:
            number = first + next(
                i for i, ids in enumerate(batch["input_ids"].to_pylist()) if max(ids, default=0) >= size
            )
            row = rows[number]
            token = next(token for token in row["input_ids"] if token >= size)
            raise DataError(f"{row.get('origin', f'row {number}')} holds {_beyond(token, size, tokenizer)}")
        first += len(batch)


def _beyond(token: int, size: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    name = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    return (
        f"token {token}{name}, and the model's embedding has {size} rows (vocab_size of its config.json): the tokenizer has "
        "tokens that the model was not given. Use the tokenizer that belongs to the model, or save the model with "
        "model.resize_token_embeddings(len(tokenizer)) first."
    )
