"""Helpers for a loaded model that training and measuring share: evaluation mode, and token ids against its embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode for the duration of the block.

    The mode is restored module by module: parts that were frozen in evaluation mode stay in it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_token_ids(rows: Dataset, size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Check that every token of encoded rows, and the padding token, has a row in the model's embedding.

    Without this check, training ends in an index error of torch at the first such token.

    Args:
        rows (`Dataset`): with the column `input_ids`.
        size (`int`): rows of the model's embedding, `vocab_size` of its configuration.
        tokenizer (`PreTrainedTokenizerBase` or `None`): for the padding token, and for names in the message.

    Raises:
        DataError: a token id of at least `size`; names the first such row and the token.
    """
    import pyarrow.compute as pc  # comes with datasets, which is optional

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
        "more tokens than the model. Use the tokenizer that belongs to the model, or save the model with "
        "model.resize_token_embeddings(len(tokenizer)) first."
    )
