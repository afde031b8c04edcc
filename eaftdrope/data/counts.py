"""The report of a data set: counts by source, the fields that were read, stop tokens, and rows that are copies.

Two rows are copies if their tokens are equal, whatever of them is trained: what one trains, the other would measure. Copies
are counted, and never on both sides of a held-out share.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from eaftdrope.errors import LostTextError

from .encoding import IGNORED, Encoded
from .fields import is_metadata
from .formats import Example
from .template import template_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Rows may have keys that are data (an identifier for a key): their paths are counted together.
_PATHS_KEPT = 200
_OTHER_PATHS = "(other fields)"
_NAMES_WARNED_OF = 6
# A mean weight outside of it is a change of the learning rate, or no weight at all.
_USUAL_MEAN = (0.1, 10.0)


@dataclass
class SourceReport:
    """Counts of one source. `read` to `cut_off` count rows of the source; the rest counts the mixture's rows.

    Args:
        read (`int`): rows read.
        skipped (`int`): bad rows left out.
        fully_masked (`int`): rows without a trained token, left out.
        cut_off (`int`): those of `fully_masked` whose trained tokens were all beyond `max_length`.
        truncated (`int`): rows kept whose end was cut off at `max_length`.
        encoded (`int`): rows kept, before the weight applied.
        rows (`int`): rows in the dataset, repetitions counted.
        tokens (`int`): their tokens.
        trained_tokens (`int`): their tokens that count in the loss.
        fields_read (`dict[str, int]`): number of rows for each path of a key that was read (`messages[].role`).
        fields_ignored (`dict[str, int]`): the same for the keys that were not read.
        dropped (`dict[str, int]`): number of rows for each path that the chat template leaves out by design (reasoning of
            earlier turns); they are trained.
        lost (`dict[str, int]`): number of rows for each path whose text is missing from the rendering; they are bad.
    """

    read: int = 0
    skipped: int = 0
    fully_masked: int = 0
    cut_off: int = 0
    truncated: int = 0
    encoded: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    fields_read: dict[str, int] = field(default_factory=dict)
    fields_ignored: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    def add_fields(self, example: Example) -> None:
        """Count the fields of a row that were read, and those that were not."""
        _count(self.fields_read, example.fields_read)
        _count(self.fields_ignored, example.fields_ignored)

    def add_dropped(self, paths: Iterable[str]) -> None:
        """Count what the chat template leaves out of a row by design."""
        _count(self.dropped, _without_indices(paths))

    def add_lost(self, error: Exception) -> None:
        """Count what a row lost, if it is refused for that."""
        if isinstance(error, LostTextError):
            _count(self.lost, _without_indices(error.lost))

    @property
    def unread_text(self) -> dict[str, int]:
        """Return those of `fields_ignored` that may be more than metadata (`id`, `source`, ...), most rows first."""
        names = [path for path in self.fields_ignored if not is_metadata(path)]
        return {path: self.fields_ignored[path] for path in sorted(names, key=lambda path: -self.fields_ignored[path])}


def _without_indices(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\[\d+\]", "[]", path) for path in paths))


def _count(counts: dict[str, int], paths: Iterable[str]) -> None:
    for path in paths:
        if path not in counts and len(counts) >= _PATHS_KEPT:
            path = _OTHER_PATHS
        counts[path] = counts.get(path, 0) + 1


@dataclass
class WeightCounts:
    """The weights of trained tokens, over the rows as they were encoded.

    Args:
        rows (`int`): rows in which a token has a weight other than 1, or is exempt from the gate.
        tokens (`int`): trained tokens of all rows.
        sum, smallest, largest (`float`): of their weights, without the sign of the exempt ones.
    """

    rows: int = 0
    tokens: int = 0
    sum: float = 0.0
    smallest: float = math.inf
    largest: float = 0.0
    exempt: dict[str, int] = field(default_factory=dict)

    def add(self, encoded: Encoded) -> None:
        self.tokens += encoded.trained_tokens
        for string, count in encoded.weights.exempt.items():
            self.exempt[string] = self.exempt.get(string, 0) + count
        values, labels = encoded.weights.values, encoded.labels
        weights = [1.0]
        if values is None:
            self.sum += encoded.trained_tokens
        else:
            self.rows += 1
            weights = [abs(value) for value, label in zip(values[1:], labels[1:], strict=True) if label != IGNORED]
            self.sum += sum(weights)
        self.smallest = min(self.smallest, *weights)
        self.largest = max(self.largest, *weights)

    @property
    def mean(self) -> float:
        return self.sum / self.tokens if self.tokens else 1.0


@dataclass
class DataReport:
    """The report of a data set.

    Args:
        by_source (`dict[str, SourceReport]`): counts by source, in order.
        skipped (`list[tuple[str, str]]`): origin and reason of the bad rows left out, the first 100 of them.
        stop_token_trained (`bool`): every row that is not truncated ends its last answer in a trained stop token.
        stop_tokens (`list[str]`): the stop tokens found, such as `["<|im_end|>"]`.
        weights ([`WeightCounts`]): of the trained tokens.
        warnings (`list[str]`): what may go wrong in training, with its consequence and what to do.
    """

    by_source: dict[str, SourceReport] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    stop_token_trained: bool = False
    stop_tokens: list[str] = field(default_factory=list)
    weights: WeightCounts = field(default_factory=WeightCounts)
    warnings: list[str] = field(default_factory=list)

    def _sum(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.by_source.values())

    @property
    def read(self) -> int:
        return self._sum("read")

    @property
    def rows(self) -> int:
        return self._sum("rows")

    @property
    def skipped_rows(self) -> int:
        return self._sum("skipped")

    @property
    def fully_masked(self) -> int:
        return self._sum("fully_masked")

    @property
    def cut_off(self) -> int:
        return self._sum("cut_off")

    @property
    def truncated(self) -> int:
        return self._sum("truncated")

    @property
    def encoded(self) -> int:
        return self._sum("encoded")

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def trained_tokens(self) -> int:
        return self._sum("trained_tokens")

    @property
    def truncated_share(self) -> float:
        """Return the share of the encoded rows that were truncated."""
        return self.truncated / self.encoded if self.encoded else 0.0

    def warn_of_weights(self) -> None:
        """Add a warning for each exempt string that no trained token belongs to, and for weights that change the scale."""
        for string, count in self.weights.exempt.items():
            if not count:
                self.warnings.append(
                    f"loss.exempt: {string!r} occurs in no trained text, so it exempts nothing. Check its spelling."
                )
        if not _USUAL_MEAN[0] <= self.weights.mean <= _USUAL_MEAN[1]:
            self.warnings.append(
                f"the weights of rows and messages have a mean of {self.weights.mean:.3g}, which scales the loss and its "
                "gradients. If `weight` is a measurement, rename the column; otherwise divide the weights by their mean."
            )

    def warn_of_ignored_fields(self) -> None:
        """Add one warning per source that has fields that are not read and may be more than metadata."""
        for name, source in self.by_source.items():
            fields = [f"{path} ({count:,} of {source.read:,} rows)" for path, count in source.unread_text.items()]
            if fields:
                more = len(fields) - _NAMES_WARNED_OF
                listed = ", ".join(fields[:_NAMES_WARNED_OF]) + (f" and {more} more" if more > 0 else "")
                self.warnings.append(
                    f"{name}: not read, so nothing of it is trained: {listed}. If it belongs to the text, write it into a "
                    "field that the format reads; `eaftdrope preview` has the table."
                )


class StopTokens:
    """Counts of the rows that end in a trained stop token."""

    def __init__(self) -> None:
        self.conversations = 0
        self.complete = 0
        self.without = 0
        self.tokens: dict[str, int] = {}

    def add(self, encoded: Encoded) -> None:
        self.conversations += encoded.is_conversation
        # The end of a truncated row is missing by definition, whatever the template.
        if encoded.truncated:
            return
        self.complete += 1
        if encoded.stop is None:
            self.without += 1
        else:
            self.tokens[encoded.stop] = self.tokens.get(encoded.stop, 0) + 1

    def report_to(self, report: DataReport, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        report.stop_tokens = sorted(self.tokens, key=lambda token: -self.tokens[token])
        report.stop_token_trained = self.complete > 0 and self.without == 0
        consequence = (
            "the model may not learn to stop, and its answers run on to the length limit, while the training loss "
            "still looks healthy."
        )
        if self.complete == 0:
            report.warnings.append(
                f"every row is cut off at max_length: {max_length}, so no end of an answer is trained: {consequence} "
                "Raise max_length, or split the rows."
            )
        elif self.without:
            report.warnings.append(
                f"{self.without} of {self.complete} complete rows do not end in a trained stop token: {consequence} "
                "Use a chat template whose assistant turn ends in a special token such as <|im_end|>, or bring the rows "
                f"as prompt and completion strings: they end in the end-of-sequence token ({tokenizer.eos_token})."
            )
        if self.conversations and template_of(tokenizer).prompt_differs:
            report.warnings.append(
                "the chat template ends its generation prompt in "
                f"{template_of(tokenizer).prompt_differs!r}, which answered conversations do not have there: at "
                "inference the model sees a prompt that it was not trained on. Put it in front of the answers "
                "(reasoning belongs in reasoning_content), or use a template whose conversations begin with its prompt."
            )


# --- copies -----------------------------------------------------------------------------------------------------------


# rows can be whole books
_BATCH = 256


def content_key(ids: Sequence[int]) -> int:
    """Return 64 bits that are equal for equal tokens (two of a million other rows collide with probability 3e-8)."""
    return int.from_bytes(hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest(), "little")


def repeated_rows(keys: Sequence[int]) -> tuple[int, tuple[int, int]] | None:
    """Return the number of rows that are copies of an earlier one, and the first such pair; None if there is no copy."""

    _, first, which = np.unique(np.asarray(keys, dtype=np.uint64), return_index=True, return_inverse=True)
    earlier = first[which]
    (copies,) = np.nonzero(earlier != np.arange(len(keys)))
    return (len(copies), (int(earlier[copies[0]]), int(copies[0]))) if len(copies) else None


def held_out_warnings(train: Dataset, held_out: Dataset, report: DataReport) -> list[str]:
    """Return warnings about rows held out in sources of their own: copies of training rows, and rows left out."""
    trained = set(_keys(train))
    shared = [origin for key, origin in zip(_keys(held_out), held_out["origin"][:]) if key in trained]
    found = []
    if shared:
        found.append(
            f"{len(shared):,} of {len(held_out):,} held-out rows are also trained (the first: {shared[0]}): "
            "measurements on them show memorisation. Remove them from one of the two."
        )
    if report.skipped_rows:
        origin, reason = report.skipped[0]
        found.append(f"{report.skipped_rows:,} held-out rows are bad and left out; the first: {origin}: {reason}")
    return found


def groups_of(origins: Sequence[str], dataset: Dataset) -> list[list[str]]:
    """Return the origins that must stay together, in the order of their first rows."""
    group_of: dict[str | int, list[str]] = {}
    for origin, key in zip(origins, _keys(dataset), strict=True):
        mine, copies = group_of.get(origin), group_of.get(key)
        group = mine or copies or []
        if mine is None:
            group.append(origin)
        if mine and copies and mine is not copies:
            # one origin read twice in two ways, and a copy of each: all of them are one group
            mine += copies
            for name, other in group_of.items():
                if other is copies:
                    group_of[name] = mine
        group_of[origin] = group_of[key] = group
    return list({id(group): group for group in group_of.values()}.values())


def choose(groups: list[list[str]], share: float, wanted: int, seed: int) -> list[list[str]]:
    """Choose groups with at most `wanted` rows together.

    They are drawn as single rows would be, as long as they fit (the smallest of all if none does).
    """
    drawing = random.Random(f"{seed}:hold out")
    first = drawing.sample(range(len(groups)), max(1, int(share * len(groups) + 0.5)))
    drawn = set(first)
    rest = [number for number in range(len(groups)) if number not in drawn]
    chosen, rows = [], 0
    for number in (*first, *drawing.sample(rest, len(rest))):
        if rows + len(groups[number]) <= wanted:
            chosen.append(groups[number])
            rows += len(groups[number])
    return chosen or [min(groups, key=len)]


def _keys(dataset: Dataset) -> Iterator[int]:
    for batch in dataset.select_columns(["input_ids"]).iter(_BATCH):
        yield from map(content_key, batch["input_ids"])
