"""The table as text: rows, sections, numbers, marks."""

import io
import math

import pytest
from rich.console import Console

from eaftdrope.evaluate import comparison, comparison_markdown
from eaftdrope.evaluate.scores import Score, score_units
from eaftdrope.evaluate.table import comparison_lines, error_text
from eaftdrope.report.words import interval_text, value_text


def scores(loss, right, ppl):
    units = [(loss * 10, 10.0), ((loss + 0.02) * 10, 10.0), ((loss - 0.02) * 10, 10.0)]
    shares = [(1.0, 1.0)] * right + [(0.0, 1.0)] * (12 - right)
    return [
        score_units("perplexity", "general", "perplexity", [(ppl, 1.0)] * 3, kind="exp", better="lower"),
        score_units("held_out_loss", "target", "held-out loss", units, kind="mean", better="lower"),
        score_units("function_calls", "target", "exact calls", shares, kind="share", better="higher"),
    ]


BEFORE, AFTER = scores(0.881, 0, 3.0), scores(0.101, 2, 3.1)


def test_markdown():
    assert comparison_markdown(BEFORE, AFTER) == (
        "| | before | after | change | |\n"
        "|---|---:|---:|---:|---|\n"
        "| **Target: what was trained** | | | | |\n"
        "| held-out loss ↓ | 0.881 | 0.101 | -0.780 | better |\n"
        "| exact calls ↑ | 0.0 % (0/12) | 16.7 % (2/12) | +16.7 % ± 13.8 % | not enough evidence (needs 33 items) |\n"
        "| **General: what may be forgotten** | | | | |\n"
        "| perplexity ↓ | 20.09 | 22.20 | +2.11 | worse |\n"
        "\n± is one standard error. A change is called better or worse beyond two standard errors of it, more for several "
        "metrics (Holm's correction).\n"
    )


def test_terminal_table_says_the_same():
    console = Console(file=io.StringIO(), width=140)
    console.print(comparison(BEFORE, AFTER))
    text = console.file.getvalue()
    lines = [line for line in text.splitlines() if "held-out" in line or "exact" in line or "perplexity" in line]
    assert [line.split()[-1].strip("│ ") or line.split()[-2] for line in lines] == ["better", "items)", "worse"]
    assert text.index("Target: what was trained") < text.index("held-out loss") < text.index("General: what may be")
    assert "0.0 % (0/12)" in text and "22.20" in text


def test_a_score_of_one_side_only_is_shown_without_a_verdict():
    text = comparison_markdown(BEFORE[:1], AFTER)
    assert "| held-out loss ↓ | – | 0.101 | – |  |" in text
    text = comparison_markdown(BEFORE, AFTER[:1])
    assert "| exact calls ↑ | 0.0 % (0/12) | – | – |  |" in text


def loss_line(before, after, kind="mean"):
    sides = [
        [score_units("p", "target", "m", [(value, 1.0), (value + spread, 1.0)], kind=kind, better="lower")]
        for value, spread in (before, after)
    ]
    (line,) = comparison_lines(*sides)
    return line.before, line.after, line.change, line.verdict


@pytest.mark.parametrize(
    ("before", "after", "kind", "line"),
    [
        ((6.256, 0.0), (math.nan, 0.0), "mean", ("6.256", "not a number", "–", "not a number")),
        ((math.nan, 0.0), (6.256, 0.0), "mean", ("not a number", "6.256", "–", "not a number")),
        # e^800 is beyond what a float holds
        ((2.0, 0.0), (800.0, 0.0), "exp", ("7.39", "infinite", "–", "worse")),
        ((math.inf, 0.0), (2.0, 0.0), "mean", ("infinite", "2.000", "–", "better")),
        ((math.inf, 0.0), (math.inf, -math.inf), "mean", ("infinite", "not a number", "–", "not a number")),
        # what the table would show as no change is none, and has no minus
        ((1.0, 0.5), (0.9999, 0.5), "mean", ("1.250", "1.250", "+0.000", "no clear change")),
        ((1.0, 0.5), (0.9994, 0.5), "mean", ("1.250", "1.249", "-0.001", "better")),
    ],
)
def test_what_is_no_number_and_what_is_no_change(before, after, kind, line):
    assert loss_line(before, after, kind) == line


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (0.0123, "mean", " ± 0.012"),
        # what the table's digits would make 0
        (0.0004, "mean", " ± 0.0004"),
        (0.004, "exp", " ± 0.004"),
        (0.0004, "share", " ± 0.04 %"),
        (0.0, "mean", ""),
        (None, "share", ""),
    ],
)
def test_no_error_is_shown_as_0(error, kind, text):
    assert error_text(error, kind) == text


def test_no_interval_of_0():
    """All right, all wrong, one item, identical rows, and an error below the table's digits."""

    def shown(units, kind, better="higher"):
        score = score_units("a probe", "general", "m", units, kind=kind, better=better)
        return value_text(score), interval_text(score)

    assert shown([(1.0, 1.0)] * 12, "share") == ("100.0 % ± 8.3 %", "83.8 % to 100.0 %")
    assert shown([(0.0, 1.0)] * 12, "share") == ("0.0 % ± 8.3 %", "0.0 % to 16.2 %")
    assert shown([(1.0, 1.0)], "share") == ("100.0 % ± 21.9 %", "57.1 % to 100.0 %")
    assert shown([(3.0, 1.0)], "mean") == ("3.000", "not known")
    # the same row in batches of other widths
    assert shown([(3.0, 1.0), (3.0000003, 1.0), (2.9999998, 1.0)], "mean") == ("3.000", "not known")
    assert shown([(0.0, 4.0)] * 3, "mean") == ("0.000", "not known")
    assert interval_text(Score("p", "general", "m", 2.0, 1e-4, 9, "lower")) == "2.000 ± 0.0002"
