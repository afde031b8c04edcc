"""Matching at an equal target loss: known answers, and exact weights."""

import math

import pytest

from eaftdrope.compare.arms import ArmSpec
from eaftdrope.compare.match import find_share, left_out_reasons, level_of, tolerance_of
from eaftdrope.compare.plan import Arm
from eaftdrope.evaluate.scores import change_stderr, score_units


def held_out(*values):
    return score_units(
        "held_out_loss", "target", "held-out loss", [(value, 1.0) for value in values], kind="mean", better="lower"
    )


def arm(label, seed=0):
    return Arm(ArmSpec(label), 1e-3, seed, label)


def counted(function):
    calls = []

    def loss(share):
        calls.append(share)
        return function(share)

    return loss, calls


@pytest.mark.parametrize("level", [2.9, 2.5, 1.7, 1.01])
def test_a_parabola_is_solved(level):
    """loss(a) = 1 + 2 (1 - a)^2 falls from 3 to 1, and is `level` at a = 1 - sqrt((level - 1) / 2)."""
    loss, calls = counted(lambda a: 1 + 2 * (1 - a) ** 2)
    found = find_share(loss, level, 1e-4)
    assert found.monotone and len(calls) <= 11
    # the loss is flat near the end
    assert found.share == pytest.approx(1 - math.sqrt((level - 1) / 2), abs=5e-3)
    assert abs(found.loss - level) <= 1e-4 and found.loss == pytest.approx(loss(found.share))


def test_the_weakest_stays_where_it_is():
    loss, calls = counted(lambda a: 3 - a)
    found = find_share(loss, 2.0, 1e-3)
    assert (found.share, found.loss, found.monotone) == (1.0, 2.0, True)
    assert calls == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_first_of_two_crossings_is_taken_and_the_path_is_reported_as_not_monotone():
    """Down to 1 in the middle and up to 2 again: the level 2 is reached at 1/4 and at 3/4 + 1/4."""
    found = find_share(lambda a: 1 + 4 * abs(a - 0.5) if a < 0.5 else 1 + 2 * (a - 0.5), 2.0, 1e-6)
    assert found.share == pytest.approx(0.25) and not found.monotone


def test_a_level_that_is_never_reached():
    found = find_share(lambda a: 3 - a, 1.5, 1e-3)
    assert found.share is None and found.loss is None


def test_the_tolerance_is_small_against_gain_and_error():
    base, end = held_out(3.0, 4.0, 5.0), held_out(1.0, 2.5, 2.0)
    gain, error = base.value - end.value, change_stderr(base, end)
    assert tolerance_of(base, end) == min(0.01 * gain, 0.1 * error) == 0.01 * gain
    close = held_out(2.999, 3.999, 5.001)
    assert tolerance_of(base, close) == 0.01 * (base.value - close.value)
    # one row has no error
    assert tolerance_of(held_out(3.0), held_out(2.0)) == pytest.approx(0.01)
    exact = held_out(2.0, 3.0, 4.0)
    assert tolerance_of(base, exact) == pytest.approx(0.0, abs=1e-12)


def test_participating_arms():
    base = held_out(3.0, 4.0, 5.0, 6.0)

    def at(gain):
        return base, held_out(*(value - gain - 0.01 * i for i, (value, _) in enumerate(base.units)))

    ends = {arm("none"): at(2.0), arm("eaft"): at(1.0), arm("dft"): at(0.4), arm("talr"): at(-0.5)}
    assert left_out_reasons(ends) == {
        arm("dft"): "its gain is 21% of that of none, too little for a comparison",
        arm("talr"): "no clear gain on the target",
    }
    level = level_of({name: ends[name] for name in (arm("none"), arm("eaft"))})
    assert level.weakest == "eaft" and level.level == ends[arm("eaft")][1].value
    assert level.of_largest_gain == pytest.approx(1.015 / 2.015)
