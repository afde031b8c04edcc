"""The toy's task: every sequence hides its own successor table, and the best predictions that are possible.

The table has one successor for each of 24 symbols, drawn independently and uniformly. The next symbol is table[x] with
probability 0.85, else a uniform one (table[x] included). A reader must find the table in the sequence itself, so what it
predicts late in a sequence shows how much of the sequence it remembers.

Shapes: B sequences, T tokens, S symbols.
"""

from __future__ import annotations

import numpy as np

SYMBOLS, LENGTH = 24, 256
FOLLOWS = 0.85
BIN = 32

# first numbers of the seeds of sequences that every arm and training seed shares
_TEST, _VALIDATION, _TRAINING = 1, 2, 3


def draw(random: np.random.Generator, count: int, length: int = LENGTH, symbols: int = SYMBOLS) -> np.ndarray:
    """Return `count` sequences, each with its own table, `[B, T]`."""
    return follow(random, random.integers(symbols, size=(count, symbols)), length)


def follow(
    random: np.random.Generator, tables_BS: np.ndarray, length: int = LENGTH, first_B: np.ndarray | None = None
) -> np.ndarray:
    """Return one sequence for each table, `[B, T]`, which begins with `first_B` or with a uniform symbol."""
    count, symbols = tables_BS.shape
    noise_BT = random.integers(symbols, size=(count, length))
    follows_BT = random.random((count, length)) < FOLLOWS
    sequences_BT, rows_B = noise_BT.copy(), np.arange(count)
    if first_B is not None:
        sequences_BT[:, 0] = first_B
    for t in range(1, length):
        successor_B = tables_BS[rows_B, sequences_BT[:, t - 1]]
        sequences_BT[:, t] = np.where(follows_BT[:, t], successor_B, noise_BT[:, t])
    return sequences_BT


def test_sequences(count: int) -> np.ndarray:
    return draw(np.random.default_rng([_TEST]), count)


def validation_sequences(count: int) -> np.ndarray:
    return draw(np.random.default_rng([_VALIDATION]), count)


def training_batch(seed: int, step: int, count: int) -> np.ndarray:
    return draw(np.random.default_rng([_TRAINING, seed, step]), count)


def bayes_nll(sequences_BT: np.ndarray, reach: int | None = None, symbols: int = SYMBOLS) -> np.ndarray:
    """Return the negative log-likelihood of tokens 1 to T - 1 under Bayesian prediction, `[B, T - 1]`, in nats.

    The rows of a table are independent, so the posterior of table[x] needs only the successors of x that were seen: each
    multiplies the odds of its symbol by (FOLLOWS + u) / u with u = (1 - FOLLOWS) / symbols.

    Args:
        sequences_BT (`[B, T]`): sequences of the task.
        reach (`int`, *optional*): number of previous tokens that the reader sees; None: all. A reader with a reach treats
            what it sees as a new sequence and neglects what its first symbol reveals (see `sampled_nll`).
        symbols (`int`): size of the alphabet.
    """
    count, length = sequences_BT.shape
    rows_B, noise = np.arange(count), (1 - FOLLOWS) / symbols
    seen_BSS, nll_BT = np.zeros((count, symbols, symbols)), np.empty((count, length - 1))
    for t in range(1, length):
        if t >= 2:
            seen_BSS[rows_B, sequences_BT[:, t - 2], sequences_BT[:, t - 1]] += 1
        if reach is not None and t > reach:
            seen_BSS[rows_B, sequences_BT[:, t - reach - 1], sequences_BT[:, t - reach]] -= 1
        log_odds_BS = seen_BSS[rows_B, sequences_BT[:, t - 1]] * np.log((FOLLOWS + noise) / noise)
        posterior_BS = np.exp(log_odds_BS - log_odds_BS.max(1, keepdims=True))
        posterior_BS /= posterior_BS.sum(1, keepdims=True)
        nll_BT[:, t - 1] = -np.log(FOLLOWS * posterior_BS[rows_B, sequences_BT[:, t]] + noise)
    return nll_BT


def sampled_nll(
    sequences_BT: np.ndarray, reach: int, at: range, *, tables: int = 400, symbols: int = SYMBOLS
) -> tuple[np.ndarray, np.ndarray]:
    """Return the Bayesian negative log-likelihood of the tokens `at`, without and with what the first symbol in view
    reveals, each `[B, len(at)]`, by importance sampling.

    The first symbol in view is more probable under a table with many paths to it. `bayes_nll` neglects that, so it is an
    upper bound of what a reader of `reach` tokens can attain; the difference of the two results estimates the gap. Both use
    the same sampled tables: `tables` draws from the posterior given the transitions in view.
    """
    random = np.random.default_rng(0)
    noise = (1 - FOLLOWS) / symbols
    found_BT2 = np.empty((len(sequences_BT), len(at), 2))
    for b, sequence_T in enumerate(sequences_BT):
        for n, t in enumerate(at):
            view_T = sequence_T[max(0, t - reach) : t]
            seen_SS = np.zeros((symbols, symbols))
            np.add.at(seen_SS, (view_T[:-1], view_T[1:]), 1)
            posterior_SS = np.exp((seen_SS - seen_SS.max(1, keepdims=True)) * np.log((FOLLOWS + noise) / noise))
            posterior_SS /= posterior_SS.sum(1, keepdims=True)
            drawn_KS = (random.random((tables, symbols, 1)) > posterior_SS.cumsum(1)).sum(2).clip(max=symbols - 1)
            weight_K = _arrival(drawn_KS, max(0, t - reach))[:, view_T[0]]
            hit_K = drawn_KS[:, view_T[-1]] == sequence_T[t]
            for column, weights_K in enumerate((np.ones(tables), weight_K)):
                found_BT2[b, n, column] = -np.log(FOLLOWS * np.average(hit_K, weights=weights_K) + noise)
    return found_BT2[..., 0], found_BT2[..., 1]


def _arrival(tables_KS: np.ndarray, steps: int) -> np.ndarray:
    """Return each table's distribution of the symbol after `steps` steps from a uniform one, `[K, S]`."""
    tables, symbols = tables_KS.shape
    arrival_KS, places = np.full((tables, symbols), 1 / symbols), np.arange(tables)[:, None] * symbols + tables_KS
    # noise forgets the start: 0.85^60 is below 1e-4
    for _ in range(min(steps, 60)):
        moved_KS = np.bincount(places.ravel(), arrival_KS.ravel(), tables * symbols).reshape(tables, symbols)
        arrival_KS = FOLLOWS * moved_KS + (1 - FOLLOWS) / symbols
    return arrival_KS


def by_bin(nll_BT: np.ndarray) -> np.ndarray:
    """Return the mean over the predicted tokens of each bin of 32 positions (31 in the first), per sequence: `[B, bins]`."""
    bins = range(0, nll_BT.shape[1] + 1, BIN)
    return np.stack([nll_BT[:, max(0, start - 1) : start + BIN - 1].mean(1) for start in bins], 1)
