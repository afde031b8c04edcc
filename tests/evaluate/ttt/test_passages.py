"""Passages stay inside documents, and a rate is never fitted on test text."""

import math

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate.ttt.passages import choose_passages, cut_passages, runs_of, shared
from eaftdrope.evaluate.ttt.rate import RateFit


def document(seed, length):
    return [(seed * 7919 + i * i * 31 + i) % 100_003 for i in range(length)]


def positions(passages, prefix):
    """Every (document, token) of some passages."""
    return [(p.document, p.start + i) for p in passages for i in range(len(p.ids) - prefix)]


def test_passages_are_consecutive_blocks_of_one_document():
    documents = [document(1, 205), document(2, 99), document(3, 100)]
    passages = cut_passages(documents, [9], 101)
    assert [(p.document, p.start) for p in passages] == [(0, 0), (0, 100), (2, 0)]
    assert all(p.ids == [9, *documents[p.document][p.start : p.start + 100]] for p in passages)


@pytest.mark.parametrize(("blocks", "test", "fit"), [(30, 16, 4), (20, 16, 4), (10, 8, 2), (4, 3, 1), (1, 1, 0)])
def test_the_fit_has_passages_of_its_own(blocks, test, fit):
    passages = cut_passages([document(number, 300) for number in range(blocks)], [9], 301)
    chosen = choose_passages(passages, 16, None, 4)
    assert (len(chosen.test), len(chosen.fit)) == (test, fit)
    used = positions([*chosen.test, *chosen.fit], 1)
    assert len(used) == len(set(used)), "a passage is used twice"


def test_without_a_fit_every_passage_is_test_text():
    passages = cut_passages([document(1, 400)], [], 100)
    assert choose_passages(passages, 16, None, 0) == (passages, [])


def test_a_document_that_occurs_twice_is_found():
    twice = document(5, 100)
    passages = cut_passages([twice, *(document(number, 100) for number in range(6, 12)), twice], [], 100)
    with pytest.raises(UserError, match=r"100 % of a passage for the fit .* is test text too \(document 8, token 0\)"):
        choose_passages(passages, 16, None, 1)


def test_fitting_text_that_overlaps_the_test_text_is_refused():
    text = document(5, 400)
    test = cut_passages([text], [], 100)
    # half a block further, so that no two blocks are equal
    shifted = cut_passages([text[50:]], [], 100)
    with pytest.raises(UserError, match="pass other text with --fit-text"):
        choose_passages(test, 16, shifted, 1)
    other = cut_passages([document(6, 400)], [], 100)
    assert choose_passages(test, 16, other, 2) == (test, [other[0], other[2]])


def test_share_of_common_runs():
    text, other = document(5, 200), document(6, 200)
    assert shared(text, runs_of([other])) == 0 and shared(text, runs_of([other, text])) == 1
    # 69 runs of 32 tokens; those that begin in the first 19 places lie in the copied half
    assert shared([*text[:50], *other[:50]], runs_of([text])) == pytest.approx(19 / 69)


def test_the_best_rate():
    fit = RateFit({0.1: 2.5, 0.3: 2.4, 1.0: math.nan}, 4)
    assert fit.best == 0.3 and not fit.at_edge
    assert RateFit({0.1: 2.5, 0.3: 2.6}, 4).at_edge
