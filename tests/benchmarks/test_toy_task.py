"""The toy of test-time training: its sequences are as stated, and its ceilings equal an enumeration of all tables."""

import itertools

import numpy as np
import pytest

from benchmarks.ttt.toy import task

SYMBOLS = 3
TABLES = np.array(list(itertools.product(range(SYMBOLS), repeat=SYMBOLS)))


def step_probabilities(symbols=SYMBOLS):
    """P[table, x, next], `[27, 3, 3]`."""
    found = np.full((len(TABLES), symbols, symbols), (1 - task.FOLLOWS) / symbols)
    for n, table in enumerate(TABLES):
        found[n, np.arange(symbols), table] += task.FOLLOWS
    return found


def enumerated_nll(sequence, t, view, start):
    """The exact prediction of token t from tokens view..t-1, of which the first is `start` steps from a uniform symbol."""
    steps = step_probabilities()
    arrival = np.full((len(TABLES), SYMBOLS), 1 / SYMBOLS)
    for _ in range(start):
        arrival = np.einsum("kx,kxy->ky", arrival, steps)
    weight = arrival[:, sequence[view]]
    for x, y in itertools.pairwise(sequence[view:t]):
        weight = weight * steps[:, x, y]
    return -np.log(weight @ steps[:, sequence[t - 1], sequence[t]] / weight.sum())


@pytest.fixture(scope="module")
def short():
    return task.draw(np.random.default_rng(5), 4, length=12, symbols=SYMBOLS)


def test_a_sequence_follows_one_table_as_often_as_stated():
    sequences = task.draw(np.random.default_rng(0), 40, length=2000)
    tables, shares = [], []
    for sequence in sequences:
        seen = np.zeros((task.SYMBOLS, task.SYMBOLS))
        np.add.at(seen, (sequence[:-1], sequence[1:]), 1)
        tables.append(seen.argmax(1))
        shares.append(seen.max(1).sum() / seen.sum())
    # the noise includes the successor itself
    assert np.mean(shares) == pytest.approx(0.85 + 0.15 / 24, abs=0.01)
    # independent tables: every symbol is a successor about as often as any other, and two tables agree by chance
    assert np.bincount(np.ravel(tables), minlength=24).min() > 20
    agree = np.mean([np.mean(a == b) for a, b in itertools.combinations(tables, 2)])
    assert agree == pytest.approx(1 / 24, abs=0.01)


def test_sequences_depend_on_their_seed_only():
    assert np.array_equal(task.training_batch(1, 2, 3), task.training_batch(1, 2, 3))
    others = [task.training_batch(2, 2, 3), task.training_batch(1, 3, 3), task.test_sequences(3)]
    others.append(task.validation_sequences(3))
    assert all(not np.array_equal(task.training_batch(1, 2, 3), other) for other in others)


@pytest.mark.parametrize("reach", [None, 1, 2, 5])
def test_the_ceiling_is_that_of_all_tables_enumerated(short, reach):
    found = task.bayes_nll(short, reach, SYMBOLS)
    assert found.shape == (4, 11)
    for b, t in itertools.product(range(4), range(1, 12)):
        view = 0 if reach is None else max(0, t - reach)
        assert found[b, t - 1] == pytest.approx(enumerated_nll(short[b], t, view, start=0), rel=1e-12)


def test_the_first_symbol_in_view_is_worth_what_enumeration_finds(short):
    without, with_it = task.sampled_nll(short, 3, range(3, 12), tables=20_000, symbols=SYMBOLS)
    differences = []
    for (b, n), found in np.ndenumerate(with_it):
        assert found == pytest.approx(enumerated_nll(short[b], n + 3, n, start=n), abs=0.03)
        assert without[b, n] == pytest.approx(enumerated_nll(short[b], n + 3, n, start=0), abs=0.03)
        differences.append(found - without[b, n])
    # not the same thing
    assert np.abs(differences).max() > 0.1


def test_bins_are_of_32_positions():
    nll = np.arange(1.0, task.LENGTH)[None]
    assert task.by_bin(nll)[0].tolist() == [16.0, *(32 * n + 15.5 for n in range(1, 8))]
