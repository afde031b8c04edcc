"""Standard errors by formula and by simulation, JSON."""

import json
import math
import random

import pytest

from eaftdrope import UserError
from eaftdrope.evaluate.scores import (
    Score,
    change_stderr,
    refuse_not_a_number,
    score_units,
    scores_from_json,
    scores_to_json,
)


def score(units, kind="mean", better="lower"):
    return score_units("p", "general", "m", units, kind=kind, better=better)


def hits(right, of):
    return score([(1.0, 1.0)] * right + [(0.0, 1.0)] * (of - right), "share", "higher")


def test_mean_is_weighted_by_tokens():
    found = score([(2.0, 1.0), (3.0, 9.0)])
    assert found.value == 0.5
    # Residuals 2 - 0.5 and 3 - 4.5: sqrt(2 / 1 * (1.5^2 + 1.5^2)) / 10.
    assert found.stderr == pytest.approx(math.sqrt(2 * 4.5) / 10)


def test_equal_weights_give_the_textbook_standard_error():
    values = [1.0, 2.0, 4.0, 7.0]
    variance = sum((v - 3.5) ** 2 for v in values) / 3
    assert score([(v, 1.0) for v in values]).stderr == pytest.approx(math.sqrt(variance / 4))
    assert score([(5 * v, 5.0) for v in values]).stderr == pytest.approx(math.sqrt(variance / 4))


def test_perplexity_is_the_exponential_with_its_error_scaled():
    units = [(20.0, 10.0), (40.0, 10.0)]
    plain, exp = score(units), score(units, "exp")
    assert exp.value == pytest.approx(math.exp(3.0))
    assert exp.stderr == pytest.approx(math.exp(3.0) * plain.stderr)


def test_share_has_the_adjusted_binomial_error():
    found = hits(3, 12)
    assert found.value == 0.25
    assert found.stderr == pytest.approx(math.sqrt((5 / 16) * (11 / 16) / 16))
    # Never certain at the ends; for many questions as the plain formula.
    assert hits(0, 12).stderr == pytest.approx(math.sqrt((2 / 16) * (14 / 16) / 16))
    assert hits(4000, 10000).stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 10000), rel=1e-3)


def test_one_unit_has_no_error():
    one, other = score([(3.0, 1.0)]), score([(1.0, 1.0)])
    assert one.stderr is None and change_stderr(one, other) is None


def test_ratio_error_agrees_with_simulation():
    rng = random.Random(0)

    def draw():
        units = []
        for _ in range(150):
            weight = rng.choice([5.0, 20.0, 60.0])
            units.append((weight * rng.gauss(2.0, 0.5), weight))
        return score(units)

    runs = [draw() for _ in range(2000)]
    mean = sum(run.value for run in runs) / len(runs)
    spread = math.sqrt(sum((run.value - mean) ** 2 for run in runs) / len(runs))
    assert sum(run.stderr for run in runs) / len(runs) == pytest.approx(spread, rel=0.05)


def test_the_same_units_are_compared_pairwise():
    """Windows differ by far more than they change: only the paired error sees that all of them rose."""
    before = [(10.0 * n, 10.0) for n in (1, 2, 3, 4)]
    after = [(10.0 * (n + 0.1 + d), 10.0) for n, d in zip((1, 2, 3, 4), (0.01, -0.01, 0.01, -0.01))]
    old, new = score(before), score(after)
    assert new.value - old.value == pytest.approx(0.1)
    assert change_stderr(old, new) == pytest.approx(math.sqrt(4 / 3 * 4 * 0.1**2) / 40)
    assert math.hypot(old.stderr, new.stderr) > 0.5


def test_paired_error_of_perplexity_is_the_delta_method():
    old, new = score([(20.0, 10.0), (40.0, 10.0)], "exp"), score([(21.0, 10.0), (43.0, 10.0)], "exp")
    pulls = [
        new.value * (b - 3.2 * 10) - old.value * (a - 3.0 * 10) for a, b in zip((20.0, 40.0), (21.0, 43.0), strict=True)
    ]
    assert change_stderr(old, new) == pytest.approx(math.sqrt(2 * sum(p * p for p in pulls)) / 20)


def test_other_units_are_compared_as_independent():
    old, new = score([(1.0, 1.0), (2.0, 1.0)]), score([(1.0, 1.0), (2.0, 2.0)])
    assert change_stderr(old, new) == pytest.approx(math.hypot(old.stderr, new.stderr))
    bare = [Score("p", "general", "m", value, 0.3, 9, "lower") for value in (1.0, 2.0)]
    assert change_stderr(*bare) == pytest.approx(math.hypot(0.3, 0.3))


def test_paired_error_of_shares():
    # One gain added and one loss: 5 gains, 0 losses in 12 are differences 1 (6 times), -1 (once), 0 (7 times).
    mean = 5 / 14
    assert change_stderr(hits(0, 12), hits(5, 12)) == pytest.approx(math.sqrt(7 - 14 * mean**2) / 14)


def test_json_round_trip_is_exact():
    scores = [score([(1 / 3, 3.0), (2.5, 7.0)], "exp"), hits(2, 5), score([(3.0, 1.0)])]
    text = scores_to_json(scores)
    assert scores_from_json(text) == scores
    assert json.loads(text)[1]["n"] == 5 and json.loads(text)[2]["stderr"] is None


def test_a_base_model_that_gives_no_number_is_refused():
    fine, bad = score([(1.0, 1.0), (2.0, 1.0)]), Score("p", "general", "perplexity", math.inf, None, 2, "lower", "exp")
    refuse_not_a_number([fine], "model")
    with pytest.raises(UserError, match=r"^perplexity of some/model is NaN or infinite before any training: no change"):
        refuse_not_a_number([fine, bad], "some/model")
