"""The column `token_weights` of a data set: from rows to batches, through TRL's preparation, packing and collation.

One number per token, for its label (not shifted): a factor on the gate, or, negated, the weight of a token that is exempt
from the gate. A data set without the column has none in its batches either.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from eaftdrope.errors import UserError

COLUMN = "token_weights"


def has_weights(rows: object) -> bool:
    """True if a data set has weights of tokens."""
    return isinstance(rows, Dataset | IterableDataset) and COLUMN in get_dataset_column_names(rows)


@dataclass
class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the weights of the tokens where the rows have them; padding has a weight of 1 and no label."""

    @staticmethod
    def like(other: DataCollatorForLanguageModeling) -> WeightedCollator:
        """Return one with the settings of TRL's."""
        return WeightedCollator(**{item.name: getattr(other, item.name) for item in fields(other) if item.init})

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if COLUMN not in examples[0]:
            return batch
        for example in examples:
            if len(example[COLUMN]) != len(example["input_ids"]):
                raise UserError(
                    f"a row has {len(example['input_ids'])} tokens and {len(example[COLUMN])} token_weights: expected one "
                    "per token."
                )
        weights = [torch.tensor(example[COLUMN], dtype=torch.float32) for example in examples]
        if self.padding_free:
            weights = [torch.cat(weights)]
        # TRL declares an integer; torch.full pads with any number
        options: dict[str, Any] = {
            "padding_value": 1.0,
            "padding_side": "right",
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        batch[COLUMN] = pad(weights, **options)
        return batch


def prepared(rows: Any, tokenizer: PreTrainedTokenizerBase, args: Any, packing: bool) -> Any:
    """Return rows that TRL has tokenised and truncated, with the weights of their tokens, and packed.

    Args:
        args ([`EAFTConfig`]): its `loss_exempt` are exempted from the gate.
    """
    cut_start = args.truncation_mode == "keep_end"
    function = partial(_weights_of_row, tokenizer=tokenizer, strings=args.loss_exempt or [], cut_start=cut_start)
    rows = rows.map(function)
    if not packing:
        return rows
    # as TRL packs, which would drop the column
    rows = pack_dataset(rows.select_columns(["input_ids", "labels", COLUMN]), args.max_length, args.packing_strategy)
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


def _weights_of_row(
    row: dict[str, Any], *, tokenizer: PreTrainedTokenizerBase, strings: list[str], cut_start: bool
) -> dict[str, list[float]]:
    ids = row["input_ids"]
    given = row.get(COLUMN)
    weights = [1.0] * len(ids) if given is None else given[-len(ids) :] if cut_start else given[: len(ids)]
    for index in exempt_tokens(ids, strings, tokenizer):
        weights[index] = -abs(weights[index])
    return {COLUMN: weights}


def exempt_tokens(ids: list[int], strings: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the indices of the tokens that cover a character of an occurrence of one of the strings in the decoded row."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = decode(ids)
    assert isinstance(text, str), "one row gives one text"
    spans = [(start, start + len(string)) for string in strings for start in occurrences(text, string)]
    if not spans:
        return []
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    if tokenizer.is_fast and again["input_ids"] == ids:
        offsets = again["offset_mapping"]
        return [
            index
            for index, (begin, end) in enumerate(offsets)
            if any(begin < stop and start < max(end, begin + 1) for start, stop in spans)
        ]
    # the decoded text has other tokens: the row's own are found by the lengths of its beginnings
    found: set[int] = set()
    for start, stop in spans:
        first = bisect_right(range(len(ids)), start, key=lambda count: len(decode(ids[:count]))) - 1
        found.update(range(first, bisect_left(range(len(ids)), stop, key=lambda count: len(decode(ids[:count])))))
    return sorted(found)


def occurrences(text: str, string: str) -> list[int]:
    """Return where `string` begins in `text`; occurrences may overlap."""
    found, at = [], text.find(string)
    while at >= 0:
        found.append(at)
        at = text.find(string, at + 1)
    return found
