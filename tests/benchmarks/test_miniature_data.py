"""The text of the miniature: its entropy is as stated, and a needle can be found from its query only."""

import math

import numpy as np
import pytest
import torch

from benchmarks.miniature import data


def new_random(seed=0):
    return np.random.default_rng(seed)


def needles_of(tokens):
    """Return key -> (value, position); every key occurs at most once."""
    found = {}
    for place, token in enumerate(tokens):
        if token >= data.VOCABULARY - data.KEYS * data.VALUES:
            key, value = divmod(token - (data.VOCABULARY - data.KEYS * data.VALUES), data.VALUES)
            assert key not in found
            found[key] = (value, place)
    return found


def questions_of(tokens, answer_T):
    """Return [(key, value, position of the answer)]."""
    first_key = 1 + data.SYMBOLS
    return [
        (tokens[place - 1] - first_key, tokens[place] - first_key - data.KEYS, place)
        for place in answer_T.nonzero().flatten().tolist()
    ]


def test_transitions_are_distributions_of_the_stated_mixture():
    table = data.transitions()
    assert np.allclose(table.sum(2), 1)
    # without the symbol before the last: the best of four successors has at least .65 * .4 of the mass
    assert (table.max(2) >= 0.65 * 0.1 + 0.30).all() and (table.min(2) == 0.05 / 32).all()


def test_the_entropy_is_that_of_the_stream():
    stream = data.filler_stream(new_random(), 200, 500)
    given = data.transitions()[stream[:, :-2], stream[:, 1:-1]]
    loss = -np.log(np.take_along_axis(given, stream[:, 2:, None], axis=2)).mean()
    knowing, not_knowing = data.entropies()
    assert loss == pytest.approx(knowing, abs=0.015)
    assert knowing + 0.05 < not_knowing < math.log(data.SYMBOLS)


def test_a_reader_of_one_symbol_has_the_other_entropy():
    stream = data.filler_stream(new_random(1), 400, 500)
    counts = np.zeros((data.SYMBOLS, data.SYMBOLS))
    np.add.at(counts, (stream[:, 1:-1], stream[:, 2:]), 1)
    given = counts / counts.sum(1, keepdims=True)
    loss = -(counts * np.log(np.maximum(given, 1e-12))).sum() / counts.sum()
    assert loss == pytest.approx(data.entropies()[1], abs=0.015)


def test_training_text():
    batch = data.training_batch(new_random(), 300)
    assert batch.tokens_BT.shape == (300, 64)
    assert batch.tokens_BT.max() < data.VOCABULARY
    counts, distances = set(), []
    for tokens, answer_T, filler_T in zip(batch.tokens_BT, batch.answer_BT, batch.filler_BT, strict=True):
        needles = needles_of(tokens.tolist())
        questions = questions_of(tokens.tolist(), answer_T)
        counts.add(len(needles))
        assert len(questions) <= data.MOST_QUERIES
        for key, value, place in questions:
            assert needles[key][0] == value and needles[key][1] < place
            distances.append(place - needles[key][1])
        assert not (filler_T & answer_T).any()
        assert ((tokens[filler_T] >= 1) & (tokens[filler_T] <= data.SYMBOLS)).all()
    assert counts == set(range(1, data.MOST_NEEDLES + 1))
    # far ones are common
    assert np.mean(np.array(distances) > 40) > 0.15


@pytest.mark.parametrize("scale", [1, 8])
def test_evaluated_text_asks_for_every_needle_once_at_its_end(scale):
    blocks = scale * data.TRAINED_BLOCKS
    batch = data.evaluation_batch(new_random(), 50, blocks)
    assert batch.tokens_BT.shape == (50, 1 + 3 * blocks)
    last = 1 + 3 * (blocks - data.ASKED)
    for tokens, answer_T, depth_T in zip(batch.tokens_BT, batch.answer_BT, batch.depth_BT, strict=True):
        needles = needles_of(tokens.tolist())
        questions = questions_of(tokens.tolist(), answer_T)
        assert len(needles) == 6 and sorted(key for key, _, _ in questions) == sorted(needles)
        for key, value, place in questions:
            assert place >= last and needles[key][0] == value
            block = (needles[key][1] - 1) // 3
            assert depth_T[place] == pytest.approx(block / (blocks - 7))
        assert torch.isnan(depth_T[~answer_T]).all()
    depths = batch.depth_BT[batch.answer_BT]
    assert depths.mean() == pytest.approx(0.5, abs=0.06)


def test_dense_text_asks_for_some_of_its_needles():
    batch = data.evaluation_batch(new_random(), 20, 168, data.DENSE_NEEDLES)
    for tokens, answer_T in zip(batch.tokens_BT, batch.answer_BT, strict=True):
        needles = needles_of(tokens.tolist())
        questions = questions_of(tokens.tolist(), answer_T)
        assert len(needles) == 24 and len({key for key, _, _ in questions}) == 6
        assert all(needles[key][0] == value for key, value, _ in questions)
    # not always the first ones
    assert batch.depth_BT[batch.answer_BT].mean() == pytest.approx(0.5, abs=0.08)


def test_a_seed_says_it_all():
    first, again, other = (
        data.evaluation_batch(new_random(seed), 5, 42).tokens_BT for seed in ([0, 1], [0, 1], [0, 2])
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
