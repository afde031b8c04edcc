"""The rule of the verdict on given numbers: both sides of every boundary."""

import math
from dataclasses import replace

import pytest

from eaftdrope.compare.verdict import BETTER, SAME, WORSE, ScoresBySeed, compare_pair, judge, judge_metrics, overall
from eaftdrope.evaluate.evidence import student_quantile
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
    t = student_quantile(n - 1)
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


def test_the_study_that_a_difference_needs():
    """Three seeds differ by 0.5 with a deviation of 0.3: t * 0.3 / sqrt(n) is below 0.5 from four seeds on."""
    pairs = [shifted(0.5 + d) for d in (-0.3, 0.0, 0.3)]
    outcome = judge("perplexity", pairs)
    assert (outcome.word, outcome.needs) == (SAME, "about 4 seeds")
    assert (
        student_quantile(3) * 0.3 / 2 < 0.5 < student_quantile(2) * 0.3 / math.sqrt(3) == pytest.approx(outcome.margin)
    )
    assert outcome.text == "no difference beyond the spread (+0.5, not beyond 0.78; about 4 seeds needed)"
    # four items with an error of 0.577 / 2: (0.577 / 0.3)^2 times as many
    outcome = judge("perplexity", [shifted(0.3, spread=0.5)])
    assert outcome.needs == "about 15 items"
    outcome = judge("perplexity", [shifted(0.3 + d, spread=0.5) for d in (-0.3, 0.0, 0.3)])
    assert outcome.needs == "about 7 seeds and about 15 items"
    # where nothing differs, no study would show it
    assert judge("perplexity", [shifted(0.0, spread=0.5)] * 2).needs == ""
    assert judge("perplexity", [shifted(1.0)]).needs == ""


def test_holm_over_the_metrics_of_a_pair():
    # 2.2 standard errors of the items: clear for one metric, not for the first of three
    weak = [shifted(1.1 / math.sqrt(3), spread=0.5)]
    assert judge("perplexity", weak).word == WORSE
    same = [shifted(0.01, spread=0.5)]
    words = [outcome.word for outcome in judge_metrics({"a": weak, "b": same, "c": same}).values()]
    assert words == [SAME, SAME, SAME]
    # a metric with one item has no error and does not count
    outcomes = judge_metrics({"a": weak, "one": [(loss(1.0), loss(9.0))]})
    assert [outcome.word for outcome in outcomes.values()] == [WORSE, SAME]
    # with seeds, the larger one of the two p-values counts
    seeds = [shifted(0.5 + d) for d in (-0.1, 0.0, 0.1)]
    assert judge("perplexity", seeds).word == WORSE
    outcomes = judge_metrics({"a": seeds, "b": [shifted(d) for d in (-0.1, 0.0, 0.1)]})
    assert outcomes["a"].margin == pytest.approx(student_quantile(2, 2) * 0.1 / math.sqrt(3))


def test_the_sentence_states_the_study_that_is_needed():
    def arm(label, general):
        values = {seed: {"held-out loss": loss(1.0, 2.0), "perplexity": loss(*general[seed])} for seed in range(3)}
        return ScoresBySeed(label, values, {})

    plain = arm("none", [(30.0, 31.0)] * 3)
    gated = arm("eaft", [(30.5 + d, 31.5 + d) for d in (-0.3, 0.0, 0.3)])
    _, whole = sentence(gated, plain, 10.0)
    assert whole.endswith(
        "eaft: no difference beyond the spread. A difference as measured would need: eaft against none about 5 seeds."
    )


def test_one_item_is_no_evidence():
    outcome = judge("perplexity", [(loss(1.0), loss(9.0))] * 3)
    assert (outcome.word, outcome.margin) == (SAME, None)
    assert "one item has no error" in outcome.text


def test_fewer_items_than_the_probe_requires_give_no_verdict():
    few = [replace(score, least=5) for score in shifted(1.0, spread=0.1)]
    outcome = judge("turns kept", [tuple(few)])
    assert (outcome.word, outcome.margin) == (SAME, None) and outcome.text.endswith("(+1; 5 items needed)")
    assert judge("turns kept", [tuple(replace(score, least=4) for score in few)]).word == WORSE
    # the other metric is judged as if it were compared by itself
    judged = judge_metrics({"turns kept": [tuple(few)], "perplexity": [shifted(1.0, spread=0.5)]})
    assert judged["perplexity"].margin == judge("perplexity", [shifted(1.0, spread=0.5)]).margin


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
        "Against none, perplexity (3 seeds; Holm's correction over 2 metrics): eaft: less is forgotten and less gained (use "
        "--match target to compare at equal gain)."
    )


@pytest.mark.parametrize(
    ("matched", "expected", "meaning"),
    [
        (20.0, "eaft: less is forgotten.", "For the same gain it forgets less."),
        (40.0, "eaft: more is forgotten.", "For the same gain it forgets more."),
        (
            30.0,
            "eaft: no difference beyond the spread (less is forgotten only because less is learned). A difference as "
            "measured would need: eaft against none about 7 seeds.",
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
