"""The rule of the verdict on given numbers: both sides of every boundary."""

import math

import pytest

from eaftdrope.compare.verdict import BETTER, SAME, STUDENT, WORSE, ScoresBySeed, compare_pair, judge, overall
from eaftdrope.evaluate.scores import change_stderr, score_units


def loss(*values, metric="perplexity", group="general", better="lower"):
    """A mean with one unit per value."""
    return score_units("a probe", group, metric, [(value, 1.0) for value in values], kind="mean", better=better)


def shifted(by, spread=0.0, n=4):
    """(reference, arm): the arm is `by` higher in the mean; its items differ by `spread` around that."""
    units = [1.0 + i for i in range(n)]
    return loss(*units), loss(*(value + by + (spread if i % 2 else -spread) for i, value in enumerate(units)))


def test_one_seed_is_judged_by_the_items_alone():
    reference, arm = shifted(1.0, spread=0.5)
    error = change_stderr(reference, arm)
    assert error == pytest.approx(0.5 / math.sqrt(3))
    outcome = judge("perplexity", [(reference, arm)])
    assert (outcome.word, outcome.n) == (WORSE, 1)
    assert outcome.difference == pytest.approx(1.0) and outcome.margin == pytest.approx(2 * error)


@pytest.mark.parametrize(("by", "word"), [(0.578, WORSE), (0.577, SAME), (-0.577, SAME), (-0.578, BETTER)])
def test_two_standard_errors_of_the_items(by, word):
    # 2 * 0.5 / sqrt(3) = 0.57735
    assert judge("perplexity", [shifted(by, spread=0.5)]).word == word


def test_higher_may_be_better():
    reference, arm = loss(1.0, 2.0, better="higher"), loss(3.0, 4.0, better="higher")
    assert judge("accuracy", [(reference, arm)]).word == BETTER
    assert judge("accuracy", [(arm, reference)]).word == WORSE


@pytest.mark.parametrize("n", [2, 3, 4, 10, 12])
@pytest.mark.parametrize("side", [0.99, 1.01])
def test_the_seeds_by_students_t(n, side):
    """Differences of a given mean and deviation; the items differ by nothing."""
    deviation = 0.1
    t = STUDENT.get(n - 1, 2.228)
    raw = [(-1) ** i * (1.0 if i < n - n % 2 else 0.0) for i in range(n)]
    scale = deviation / math.sqrt(sum(x * x for x in raw) / (n - 1))
    mean = side * t * deviation / math.sqrt(n)
    outcome = judge("perplexity", [shifted(mean + scale * x) for x in raw])
    assert outcome.margin == pytest.approx(t * deviation / math.sqrt(n))
    assert outcome.word == (WORSE if side > 1 else SAME)


def test_seeds_that_agree_are_not_enough_where_the_items_do_not():
    pairs = [shifted(0.5, spread=0.5)] * 3
    assert judge("perplexity", pairs).word == SAME
    assert judge("perplexity", [shifted(0.5, spread=0.1)] * 3).word == WORSE


def test_one_item_is_no_evidence():
    outcome = judge("perplexity", [(loss(1.0), loss(9.0))] * 3)
    assert (outcome.word, outcome.margin) == (SAME, None)
    assert "one item has no error" in outcome.text


def runs(label, target, general, matched=None, seeds=3):
    """An arm with these metrics plus a constant for each of three items, nearly equal under every seed."""

    def scores(seed, pair):
        jitter = 0.001 * seed * (1 if label != "none" else 0)
        return {
            name: loss(*(value + jitter + i for i in range(3)), metric=name, group=group)
            for name, group, value in zip(("held-out loss", "perplexity"), ("target", "general"), pair)
        }

    return ScoresBySeed(
        label,
        {seed: scores(seed, (target, general)) for seed in range(seeds)},
        {seed: scores(seed, (target, matched)) for seed in range(seeds)} if matched is not None else {},
    )


def sentence(arm, reference, base_general, level=None, controls=()):
    entry = compare_pair(arm, reference, "held-out loss", "perplexity")
    base = loss(*(base_general + i for i in range(3)))
    forgotten = judge("perplexity", [(base, found["perplexity"]) for found in reference.scores.values()])
    text = overall(
        [entry], target="held-out loss", general="perplexity", base=forgotten, level=level, controls=list(controls)
    )
    return entry["text"], text


def test_less_forgotten_and_less_gained_is_reported_as_such():
    pair, whole = sentence(runs("eaft", 2.0, 20.0), runs("none", 1.0, 30.0), 10.0)
    assert "held-out loss worse (+1, beyond" in pair and "perplexity better (-10, beyond" in pair
    assert "It gains less and forgets less; use --match target to compare at equal gain." in pair
    assert whole == (
        "Against none, perplexity (3 seeds): eaft: less is forgotten and less gained (use --match target to compare at equal "
        "gain)."
    )


@pytest.mark.parametrize(
    ("matched", "expected", "meaning"),
    [
        (20.0, "eaft: less is forgotten.", "For the same gain it forgets less."),
        (40.0, "eaft: more is forgotten.", "For the same gain it forgets more."),
        (
            30.0,
            "eaft: no difference beyond the spread (less is forgotten only because less is learned).",
            "It forgets less only because it learns less.",
        ),
    ],
)
def test_the_control_decides(matched, expected, meaning):
    pair, whole = sentence(
        runs("eaft", 2.0, 20.0, matched=matched), runs("none", 1.0, 30.0, matched=30.0), 10.0, level=0.5
    )
    assert pair.endswith(meaning)
    assert whole == (
        "Against none, perplexity at equal target loss (3 seeds; every arm interpolated to 50% of the largest gain): "
        + expected
    )


def test_nothing_forgotten_and_one_seed_are_reported():
    _, whole = sentence(runs("eaft", 1.0, 10.0, seeds=1), runs("none", 1.0, 10.0, seeds=1), 10.0)
    assert "one seed, so the spread over seeds is unknown" in whole
    assert "eaft: no difference beyond the spread." in whole
    assert "none itself shows no forgetting beyond the spread" in whole


def test_an_arm_that_could_not_be_matched_is_reported():
    _, whole = sentence(runs("dft", 3.0, 12.0), runs("none", 1.0, 30.0, matched=30.0), 10.0, level=0.5)
    assert "dft: not matched to an equal target loss" in whole


@pytest.mark.parametrize("seeds", [1, 2])
def test_an_arm_that_gives_no_number(seeds):
    broken = loss(1.0, math.nan)
    outcome = judge("perplexity", [(loss(1.0, 2.0), broken)] * seeds)
    assert (outcome.word, outcome.text, outcome.margin) == ("not a number", "not a number", None)
    scores = {seed: {"perplexity": loss(1.0, 2.0), "held-out loss": loss(1.0, 2.0)} for seed in range(seeds)}
    arm = {seed: {"perplexity": broken, "held-out loss": loss(1.0, 2.0)} for seed in range(seeds)}
    entry = compare_pair(ScoresBySeed("eaft", arm, {}), ScoresBySeed("none", scores, {}), "held-out loss", "perplexity")
    assert "perplexity not a number." in entry["text"]
    text = overall([entry], target="held-out loss", general="perplexity", base=outcome, level=None, controls=[])
    assert "eaft: not a number." in text
