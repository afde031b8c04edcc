"""Rows that are copies of others: counted, and never on both sides of a held-out share.

Two rows are copies where their tokens are equal, whatever of them is trained: what one trains, the other would measure.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from .counts import DataReport

# rows can be whole books
_BATCH = 256


def content_key(ids: Sequence[int]) -> int:
    """64 bits that are equal for equal tokens (of a million rows, two others have the same with probability 3e-8)."""
    return int.from_bytes(hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest(), "little")


def repeated_rows(keys: Sequence[int]) -> tuple[int, tuple[int, int]] | None:
    """How many rows are copies of an earlier one, and the numbers of the first such pair; None where there is no copy."""
    import numpy as np

    _, first, which = np.unique(np.asarray(keys, dtype=np.uint64), return_index=True, return_inverse=True)
    earlier = first[which]
    (copies,) = np.nonzero(earlier != np.arange(len(keys)))
    return (len(copies), (int(earlier[copies[0]]), int(copies[0]))) if len(copies) else None


def held_out_warnings(train: Dataset, held_out: Dataset, report: DataReport) -> list[str]:
    """What should be known of rows held out in sources of their own: copies of training rows, and rows left out."""
    trained = set(_keys(train))
    shared = [origin for key, origin in zip(_keys(held_out), held_out["origin"][:]) if key in trained]
    found = []
    if shared:
        found.append(
            f"{len(shared):,} of {len(held_out):,} held-out rows are also trained (the first: {shared[0]}): what is "
            "measured on them is memory. Remove them from one of the two."
        )
    if report.skipped_rows:
        origin, reason = report.skipped[0]
        found.append(f"{report.skipped_rows:,} held-out rows are bad and left out; the first: {origin}: {reason}")
    return found


def groups_of(origins: Sequence[str], dataset: Dataset) -> list[list[str]]:
    """Origins that must stay together, in the order of their first rows."""
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
    """Groups with at most `wanted` rows together: drawn as single rows would be, and while they fit (the smallest of all if
    none does)."""
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
