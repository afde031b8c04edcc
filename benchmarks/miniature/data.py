"""Synthetic text with associative recall: a filler of known entropy, and needles that are queried later.

A sequence is BOS and blocks of three tokens:

- filler  `f f f`     of one stream of symbols: P(x | y, z) = .65 P1(x | z) + .30 [x is z's successor chosen by y] + .05 / 32
- needle  `f f [kv]`  one token for a key with its value, so that retrieval needs no binding of two positions
- query   `f k v`     the key, then its value: the answer

The stream continues across the other tokens. y is the symbol before the last: only a model with access to the order of the
tokens can use it. A key occurs at most once in a sequence, and a query never precedes its needle.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

SYMBOLS, KEYS, VALUES = 32, 24, 12
BOS = 0
_FIRST_KEY = 1 + SYMBOLS
_FIRST_VALUE = _FIRST_KEY + KEYS
_FIRST_NEEDLE = _FIRST_VALUE + VALUES
VOCABULARY = _FIRST_NEEDLE + KEYS * VALUES

BLOCK = 3
TRAINED_BLOCKS = 21
TRAINED_LENGTH = 1 + BLOCK * TRAINED_BLOCKS
# of one training sequence
MOST_NEEDLES, MOST_QUERIES = 8, 10
# of one evaluated sequence: the number of queries at its end, equal to the number of needles unless it is dense
ASKED = 6
DENSE_NEEDLES = KEYS

_FIRST_ORDER, _SECOND_ORDER, _UNIFORM = 0.65, 0.30, 0.05
# P1 of the four successors of a symbol
_SUCCESSORS = (0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Batch:
    """A batch of sequences. `filler_BT` and `answer_BT` mark the tokens that are predicted from the previous ones."""

    tokens_BT: Tensor
    filler_BT: Tensor
    answer_BT: Tensor
    depth_BT: Tensor
    """The depth of the needle of each evaluated answer, from 0 (start) to 1 (just before the queries); else nan."""


@cache
def transitions() -> np.ndarray:
    """P[y, z, x] of the filler, `[32, 32, 32]`: the same language for all seeds."""
    random = np.random.default_rng(0)
    successors = np.stack([random.choice(SYMBOLS, len(_SUCCESSORS), replace=False) for _ in range(SYMBOLS)])
    chosen = random.integers(len(_SUCCESSORS), size=(SYMBOLS, SYMBOLS))
    table = np.full((SYMBOLS, SYMBOLS, SYMBOLS), _UNIFORM / SYMBOLS)
    for last in range(SYMBOLS):
        table[:, last, successors[last]] += _FIRST_ORDER * np.array(_SUCCESSORS)
        table[np.arange(SYMBOLS), last, successors[last, chosen[:, last]]] += _SECOND_ORDER
    return table


@cache
def entropies() -> tuple[float, float]:
    """Return nats per symbol, and the same without access to the symbol before the last."""
    table = transitions()
    pairs = np.full((SYMBOLS, SYMBOLS), 1 / SYMBOLS**2)
    for _ in range(1000):
        pairs = np.einsum("yz,yzx->zx", pairs, table)
    knowing = -(pairs[..., None] * table * np.log(table)).sum()
    joint = np.einsum("yz,yzx->zx", pairs, table)
    not_knowing = -(joint * np.log(joint / joint.sum(1, keepdims=True))).sum()
    return float(knowing), float(not_knowing)


def filler_stream(random: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Return symbols from 0, `[count, length]`."""
    cumulative = transitions().cumsum(2)
    drawn = random.random((length, count, 1))
    stream = np.empty((length, count), dtype=np.int64)
    stream[:2] = random.integers(SYMBOLS, size=(2, count))
    for step in range(2, length):
        below = cumulative[stream[step - 2], stream[step - 1]] < drawn[step]
        # the last bound may be rounded below 1
        stream[step] = np.minimum(below.sum(1), SYMBOLS - 1)
    return stream.T


def training_batch(random: np.random.Generator, count: int) -> Batch:
    """Return `count` sequences of the training length, each with 1 to 8 needles and at most 10 queries.

    Needles tend to be at the front and queries at the end: with uniform positions, distant answers would be rare and
    would take long to learn.
    """
    leaning = random.random((count, TRAINED_BLOCKS)) + np.arange(TRAINED_BLOCKS) / TRAINED_BLOCKS
    place = leaning.argsort(1).argsort(1)
    needles = random.integers(1, MOST_NEEDLES + 1, size=(count, 1))
    is_needle = place < needles
    before = is_needle.cumsum(1)
    is_query = ~is_needle & (before > 0) & (place >= TRAINED_BLOCKS - MOST_QUERIES)
    # the n-th needle of a sequence has the n-th key
    queried = (random.random(before.shape) * before).astype(np.int64)
    return _write(random, is_needle, is_query, np.where(is_needle, before - 1, queried))


def evaluation_batch(random: np.random.Generator, count: int, blocks: int, needles: int = ASKED) -> Batch:
    """Return sequences with `needles` anywhere; the last 6 of `blocks` blocks query as many of them, in any order."""
    haystack = blocks - ASKED
    places = np.sort(random.random((count, haystack)).argsort(1)[:, :needles], axis=1)
    is_needle, is_query = np.zeros((count, blocks), dtype=bool), np.zeros((count, blocks), dtype=bool)
    is_needle[np.arange(count)[:, None], places] = True
    is_query[:, haystack:] = True
    number = is_needle.cumsum(1) - 1
    queried = random.permuted(np.tile(np.arange(needles), (count, 1)), axis=1)[:, :ASKED]
    number[:, haystack:] = queried
    depths = np.full((count, blocks), np.nan)
    depths[:, haystack:] = np.take_along_axis(places, queried, axis=1) / (haystack - 1)
    return _write(random, is_needle, is_query, number, depths)


def _write(random, is_needle, is_query, number, depths=None) -> Batch:
    """Return the tokens of blocks `[B, blocks]`; `number` is the index of the needle within its sequence."""
    count, blocks = is_needle.shape
    keys = np.argsort(random.random((count, KEYS)), axis=1)
    values = random.integers(VALUES, size=(count, KEYS))
    key, value = (np.take_along_axis(table, number.clip(0), axis=1) for table in (keys, values))
    grid = np.zeros((count, blocks, BLOCK), dtype=np.int64)
    grid[is_needle, 2] = (_FIRST_NEEDLE + key * VALUES + value)[is_needle]
    grid[is_query, 1] = (_FIRST_KEY + key)[is_query]
    grid[is_query, 2] = (_FIRST_VALUE + value)[is_query]
    tokens = np.concatenate([np.full((count, 1), BOS), grid.reshape(count, -1)], axis=1)
    is_filler = tokens == 0
    is_filler[:, 0] = False
    stream = filler_stream(random, count, int(is_filler.sum(1).max()))
    position = is_filler.cumsum(1) - 1
    tokens = np.where(is_filler, 1 + np.take_along_axis(stream, position.clip(0), axis=1), tokens)
    # the first two symbols have no predecessors
    predicted = is_filler & (position >= 2)
    is_answer = np.zeros_like(is_filler)
    is_answer[:, BLOCK::BLOCK] = is_query
    depth = np.full(tokens.shape, np.nan)
    if depths is not None:
        depth[:, BLOCK::BLOCK] = depths
    return Batch(*(torch.from_numpy(array) for array in (tokens, predicted, is_answer, depth)))
