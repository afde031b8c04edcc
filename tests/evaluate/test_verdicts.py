"""The verdict on a change: both sides of every boundary, Holm's correction over metrics, and the items that are needed."""

import math

import pytest

from eaftdrope.evaluate.scores import Score, score_units
from eaftdrope.evaluate.verdicts import judge_change, judge_changes


def hits(right, of):
    units = [(1.0, 1.0)] * right + [(0.0, 1.0)] * (of - right)
    return score_units("p", "general", "m", units, kind="share", better="higher")


def pair(change, better="lower", *, stderr=0.5, n=9, value=5.0, kind="mean"):
    """Two independent scores whose change has this standard error."""
    sides = (value, value + change)
    return tuple(Score("p", "general", "m", side, stderr / math.sqrt(2), n, better, kind) for side in sides)


@pytest.mark.parametrize(
    ("change", "better", "expected"),
    [
        (-1.01, "lower", "better"),
        (-0.99, "lower", "not enough evidence"),
        (0.99, "lower", "not enough evidence"),
        (1.01, "lower", "worse"),
        (1.01, "higher", "better"),
        (-1.01, "higher", "worse"),
        (0.0, "higher", "not enough evidence"),
    ],
)
def test_two_standard_errors(change, better, expected):
    judged = judge_change(*pair(change, better))
    assert judged.word == expected and judged.margin == pytest.approx(1.0)
    assert judged.worsening == pytest.approx(change if better == "lower" else -change)


@pytest.mark.parametrize(
    ("change", "stderr", "kind", "expected"),
    [
        # a change up to 0.02 of a mean, 2 % of a perplexity (0.1 of 5), two points of a share would not matter
        (0.004, 0.0079, "mean", "no clear change"),
        (0.004, 0.0081, "mean", "not enough evidence"),
        (-0.02, 0.0399, "exp", "no clear change"),
        (-0.02, 0.0401, "exp", "not enough evidence"),
        (0.0, 0.0099, "share", "no clear change"),
        (0.0, 0.0101, "share", "not enough evidence"),
    ],
)
def test_no_clear_change_rules_out_one_that_matters(change, stderr, kind, expected):
    assert judge_change(*pair(change, stderr=stderr, kind=kind)).word == expected


def test_shares():
    assert judge_change(hits(0, 12), hits(5, 12)).word == "better"
    assert judge_change(hits(5, 12), hits(0, 12)).word == "worse"
    assert judge_change(hits(0, 12), hits(3, 12)).word == "not enough evidence"
    assert judge_change(hits(0, 2), hits(2, 2)).word == "better"
    assert judge_change(hits(0, 1), hits(1, 1)).word == "not enough evidence"


def test_the_items_that_a_verdict_needs():
    # 100 items have a margin of 10 points; 4 points are beyond it with (10 / 4)^2 times as many
    judged = judge_change(*pair(0.04, stderr=0.05, n=100, kind="share", value=0.5))
    assert (judged.needed, judged.text) == (625, "not enough evidence (needs 630 items)")
    assert judge_change(*pair(0.0401, stderr=0.02, n=625, kind="share", value=0.5)).word == "worse"
    # no change: 2 points are ruled out with (10 / 2)^2 times as many
    judged = judge_change(*pair(0.0, stderr=0.05, n=100, kind="share", value=0.5))
    assert judged.needed == 2500
    assert judge_change(*pair(0.0, stderr=0.0099, n=2551, kind="share", value=0.5)).word == "no clear change"
    judged = judge_change(*pair(0.0, stderr=5.0, n=100))
    assert judged.text == "not enough evidence (needs over a million items)"


def test_one_item_is_no_evidence():
    one, other = (score_units("p", "general", "m", [(value, 1.0)], kind="mean", better="lower") for value in (3.0, 1.0))
    assert judge_change(one, other).text == "not enough evidence (one item has no error)"


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [(1.0, math.nan, "not a number"), (1.0, math.inf, "worse"), (math.inf, 1.0, "better")],
)
def test_values_that_are_not_finite(before, after, word):
    sides = [Score("p", "general", "m", value, 0.1, 9, "lower") for value in (before, after)]
    judged = judge_change(*sides)
    assert (judged.word, judged.margin, judged.need) == (word, None, "")


def test_holm_over_the_metrics_of_a_comparison():
    """2.1 standard errors are clear in one metric; beside two others, 2.4 are needed for the first, then 2.28, then 2."""
    weak, strong, none = pair(1.05), pair(3.0), pair(0.0)
    assert judge_change(*weak).word == "worse"
    judged = judge_changes([weak, none, pair(0.1)])
    assert [change.word for change in judged] == ["not enough evidence"] * 3
    assert {round(change.margin / 0.5, 2) for change in judged} == {2.43}
    judged = judge_changes([weak, strong, none])
    assert [change.word for change in judged] == ["not enough evidence", "worse", "not enough evidence"]
    assert [round(change.margin / 0.5, 2) for change in judged] == [2.28, 2.43, 2.28]
    # another strong one leaves the level for the weak one as it is for a single metric
    assert [change.word for change in judge_changes([weak, strong, pair(-4.0)])] == ["worse", "worse", "better"]


def test_a_metric_without_an_error_does_not_count():
    bare = tuple(Score("p", "general", "m", value, None, 1, "lower") for value in (1.0, 2.0))
    judged = judge_changes([bare, pair(1.05)])
    assert [change.word for change in judged] == ["not enough evidence", "worse"]
