"""What `--fail-if-worse` calls worse, on both sides of every boundary; and the same in JUnit and as annotations."""

import math
from xml.etree import ElementTree

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate.scores import Score, score_units
from eaftdrope.evaluate.suites.ci_output import github_annotations, junit_xml
from eaftdrope.evaluate.suites.regressions import WorseningLimits, check_models, parse_limits, summary


def losses(mean, *, metric="perplexity", probe="a_probe", stderr=0.25, better="lower", n=100):
    """A score whose change from another one has a standard error of sqrt(2) * stderr."""
    return Score(probe, "general", metric, mean, stderr / math.sqrt(2), n, better)


def check(change, limits, **options):
    (checked,) = check_models({"base": [losses(5.0, **options)], "tuned": [losses(5.0 + change, **options)]}, limits)
    return checked


@pytest.mark.parametrize(
    ("change", "better", "word"),
    [
        (0.49, "lower", "not enough evidence"),
        (0.51, "lower", "worse"),
        (-0.51, "lower", "not worse"),
        (-0.51, "higher", "worse"),
        (0.51, "higher", "not worse"),
        (0.0, "lower", "not enough evidence"),
    ],
)
def test_without_a_margin(change, better, word):
    assert check(change, WorseningLimits(), better=better).word == word


@pytest.mark.parametrize(
    ("change", "word", "needed"),
    [
        (1.51, "worse", None),
        # 0.49 beyond the allowed 1, with a margin of 0.5 from 100 items: (0.5 / 0.49)^2 times as many
        (1.49, "not enough evidence", 105),
        (1.0, "not enough evidence", None),
        (0.51, "not enough evidence", 105),
        (0.49, "not worse", None),
        (0.0, "not worse", None),
        (-9.0, "not worse", None),
    ],
)
def test_a_margin_that_is_allowed(change, word, needed):
    checked = check(change, parse_limits(["perplexity:1"]))
    assert (checked.word, checked.change.needed) == (word, needed) or word != "not enough evidence"
    assert checked.word == word


def test_equal_models_pass():
    same = score_units("p", "general", "m", [(1.0, 1.0), (2.0, 1.0)], kind="mean", better="lower")
    (checked,) = check_models({"base": [same], "copy": [same]}, WorseningLimits())
    assert (checked.word, checked.text) == ("not worse", "not worse: m of copy: +0.000 from base (margin 0.001)")


def test_holm_over_the_checked_metrics():
    """2.1 standard errors are clear alone, and not beside another metric that is checked too."""
    names = ("perplexity", "held-out loss")
    base = [losses(5.0, metric=name) for name in names]
    tuned = [losses(5.525, metric=names[0]), losses(5.0, metric=names[1])]
    found = {"base": base, "tuned": tuned}
    assert [one.word for one in check_models(found, WorseningLimits())] == ["not enough evidence"] * 2
    (checked,) = check_models(found, parse_limits(["perplexity:0"]))
    assert (checked.metric, checked.word) == ("perplexity", "worse")


def test_which_metrics_are_checked():
    scores = [losses(5.0, metric="a", probe="one"), losses(5.0, metric="b", probe="one"), losses(5.0, metric="c")]
    found = {"base": scores, "tuned": scores, "other": scores[:2]}

    def checked(*values):
        return [(one.model, one.metric, one.allowed) for one in check_models(found, parse_limits(values))]

    assert [(model, metric) for model, metric, _ in checked("")] == [
        *(("tuned", name) for name in "abc"),
        *(("other", name) for name in "ab"),
    ]
    # a probe's name is all of its metrics, and a metric's own margin goes before it
    assert checked("one:0.5", "b:0.1")[:2] == [("tuned", "a", 0.5), ("tuned", "b", 0.1)]
    assert checked("", "c:.25")[:3] == [("tuned", "a", 0.0), ("tuned", "b", 0.0), ("tuned", "c", 0.25)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_worse(value):
    found = {"base": [losses(5.0)], "tuned": [losses(value)]}
    (checked,) = check_models(found, WorseningLimits())
    assert checked.word == "worse"


def test_one_item_does_not_fail():
    sides = [Score("p", "general", "m", value, None, 1, "lower") for value in (1.0, 9.0)]
    (checked,) = check_models({"base": sides[:1], "tuned": sides[1:]}, WorseningLimits())
    assert checked.text == "not enough evidence: m of tuned: +8.000 from base (one item has no error)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["perplexity"], r"--fail-if-worse perplexity: expected METRIC:MARGIN, such as perplexity:0\.5\."),
        (["perplexity:-1"], "expected METRIC:MARGIN"),
        (["perplexity:much"], "expected METRIC:MARGIN"),
        (["a:1", "a:2"], "--fail-if-worse a:2: a is given twice. Keep one."),
    ],
)
def test_limits_that_cannot_be_read(values, message):
    with pytest.raises(UserError, match=message):
        parse_limits(values)


def test_a_margin_for_a_metric_that_was_not_measured():
    with pytest.raises(
        UserError, match=r"perplexty: no such metric was measured\. Did you mean `perplexity`\? Metrics: p"
    ):
        check(0.0, parse_limits(["perplexty:1"]))


def test_a_model_without_a_metric_to_check():
    found = {"base": [losses(5.0)], "tuned": [losses(5.0, metric="another")]}
    with pytest.raises(UserError, match="tuned has no metric to compare with base, so nothing would be checked"):
        check_models(found, WorseningLimits())


@pytest.fixture
def three():
    """One metric of each outcome; the names have what XML and GitHub's commands escape."""
    names = ("perplexity", "a <b> & c, d: 5%", "fine")
    base = [losses(5.0, metric=name, probe=f"probe_{i}") for i, name in enumerate(names)]
    values = (9.0, 5.0, 1.0)
    tuned = [losses(value, metric=name, probe=f"probe_{i}") for i, (name, value) in enumerate(zip(names, values))]
    return check_models({"base": base, "tuned": tuned}, WorseningLimits())


def test_junit(three):
    root = ElementTree.fromstring(junit_xml(three).encode())
    assert root.tag == "testsuites" and root.attrib == {"tests": "3", "failures": "1", "skipped": "1", "errors": "0"}
    (suite,) = root
    assert suite.attrib == {"name": "tuned against base", **root.attrib}
    cases = [(case.get("classname"), case.get("name"), [child.tag for child in case]) for case in suite]
    assert cases == [
        ("probe_0", "perplexity", ["failure"]),
        ("probe_1", "a <b> & c, d: 5%", ["skipped"]),
        ("probe_2", "fine", ["system-out"]),
    ]
    assert suite[0][0].get("message") == "worse: perplexity of tuned: +4.000 from base (margin 0.607)"


def test_github_annotations(three):
    error, warning = github_annotations(three)
    assert error == ("::error title=perplexity of tuned::worse: perplexity of tuned: +4.000 from base (margin 0.607)")
    assert warning.startswith(
        "::warning title=a <b> & c%2C d%3A 5%25 of tuned::not enough evidence: a <b> & c, d: 5%25 of tuned: +0.000 from base"
    )


def test_the_summary(three):
    assert summary(three) == "3 metrics checked: 1 clearly worse, 1 without enough evidence"
    assert summary(three[2:]) == "1 metrics checked: 0 clearly worse"
