"""Synthetic text with associative recall: a filler whose entropy is known, and needles that are asked for later.

A sequence is BOS and blocks of three tokens:

- filler  `f f f`     of one stream of symbols: P(x | y, z) = .65 P1(x | z) + .30 [x is z's successor chosen by y] + .05 / 32
- needle  `f f [kv]`  one token for a key with its value, so that finding it needs no binding of two places
- query   `f k v`     the key, then its value: the answer

The stream runs through whatever stands between its symbols. y is the symbol before the last: only a model that knows the
order of what it reads can use it. A key stands in a sequence once at most, and a query never before its needle.

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
# of one evaluated sequence: so many needles are asked for, at its end, and no more are there unless it is dense
ASKED = 6
DENSE_NEEDLES = KEYS

_FIRST_ORDER, _SECOND_ORDER, _UNIFORM = 0.65, 0.30, 0.05
# P1 of the four successors of a symbol
_SUCCESSORS = (0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Batch:
    """`filler_BT` and `answer_BT` mark the tokens that are predicted from those before them."""

    tokens_BT: Tensor
    filler_BT: Tensor
    answer_BT: Tensor
    depth_BT: Tensor
    """Of an evaluated answer: where its needle stands, from 0 (start) to 1 (just before the queries); else nan."""


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
    """(nats a symbol, the same for a reader who does not know the symbol before the last)."""
    table = transitions()
    pairs = np.full((SYMBOLS, SYMBOLS), 1 / SYMBOLS**2)
    for _ in range(1000):
        pairs = np.einsum("yz,yzx->zx", pairs, table)
    knowing = -(pairs[..., None] * table * np.log(table)).sum()
    joint = np.einsum("yz,yzx->zx", pairs, table)
    not_knowing = -(joint * np.log(joint / joint.sum(1, keepdims=True))).sum()
    return float(knowing), float(not_knowing)


def filler_stream(random: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Symbols from 0, `[count, length]`."""
    cumulative = transitions().cumsum(2)
    drawn = random.random((length, count, 1))
    stream = np.empty((length, count), dtype=np.int64)
    stream[:2] = random.integers(SYMBOLS, size=(2, count))
    for step in range(2, length):
        below = cumulative[stream[step - 2], stream[step - 1]] < drawn[step]
        # the last bound may be a rounding below 1
        stream[step] = np.minimum(below.sum(1), SYMBOLS - 1)
    return stream.T


def training_batch(random: np.random.Generator, count: int) -> Batch:
    """1 to 8 needles and at most 10 queries in each of `count` sequences of the training length.

    Needles lean to the front and queries to the end: were all places alike, far answers would be rare, and a model
    would be long in learning them.
    """
    leaning = random.random((count, TRAINED_BLOCKS)) + np.arange(TRAINED_BLOCKS) / TRAINED_BLOCKS
    place = leaning.argsort(1).argsort(1)
    needles = random.integers(1, MOST_NEEDLES + 1, size=(count, 1))
    is_needle = place < needles
    before = is_needle.cumsum(1)
    is_query = ~is_needle & (before > 0) & (place >= TRAINED_BLOCKS - MOST_QUERIES)
    # the n-th needle of a sequence has its n-th key
    asked = (random.random(before.shape) * before).astype(np.int64)
    return _write(random, is_needle, is_query, np.where(is_needle, before - 1, asked))


def evaluation_batch(random: np.random.Generator, count: int, blocks: int, needles: int = ASKED) -> Batch:
    """`needles` anywhere, and the last 6 of `blocks` blocks ask for as many of them, in any order."""
    haystack = blocks - ASKED
    places = np.sort(random.random((count, haystack)).argsort(1)[:, :needles], axis=1)
    is_needle, is_query = np.zeros((count, blocks), dtype=bool), np.zeros((count, blocks), dtype=bool)
    is_needle[np.arange(count)[:, None], places] = True
    is_query[:, haystack:] = True
    number = is_needle.cumsum(1) - 1
    asked = random.permuted(np.tile(np.arange(needles), (count, 1)), axis=1)[:, :ASKED]
    number[:, haystack:] = asked
    depths = np.full((count, blocks), np.nan)
    depths[:, haystack:] = np.take_along_axis(places, asked, axis=1) / (haystack - 1)
    return _write(random, is_needle, is_query, number, depths)


def _write(random, is_needle, is_query, number, depths=None) -> Batch:
    """Tokens of blocks `[B, blocks]`, where `number` says which needle of its sequence a needle or query is about."""
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
    # the first two symbols follow nothing
    predicted = is_filler & (position >= 2)
    is_answer = np.zeros_like(is_filler)
    is_answer[:, BLOCK::BLOCK] = is_query
    depth = np.full(tokens.shape, np.nan)
    if depths is not None:
        depth[:, BLOCK::BLOCK] = depths
    return Batch(*(torch.from_numpy(array) for array in (tokens, predicted, is_answer, depth)))
