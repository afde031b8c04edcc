"""Figures show the numbers of their documents, and use the colours of a page."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from eaftdrope.report.figures.changes import changes_figure
from eaftdrope.report.figures.curves import CURVES, POINTS, curve_figure, gate_over_time, series
from eaftdrope.report.figures.landscape import gate_figure, landscape_figure, merge_windows
from eaftdrope.report.figures.pareto import pareto_figure
from eaftdrope.report.figures.style import INK, new_figure, save_figure, styled
from eaftdrope.report.words import clip, end_of, listing, start_of, visible
from tests.report.planted import compare_folder, landscape, metrics


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_landscape():
    given = landscape(400)
    figure = landscape_figure(given, "a title with $ and _")
    axes, bar = figure.axes
    image = axes.images[0]
    shown = image.get_array().shape[1]
    # entropy across, probability up, and beyond the last token but one empty column
    assert np.array_equal(image.get_array().filled(0), np.array(given["density"])[:shown].T)
    assert image.get_extent() == [0, pytest.approx(0.1 * shown), 0, 1]
    assert image.get_array().mask.sum() == (np.array(given["density"])[:shown] == 0).sum()
    assert axes.texts[0].get_text() == "confident conflicts\n(in the corner): 10.0 %"
    corner = axes.lines[0]
    assert list(corner.get_xdata()) == [0, 0.5, 0.5] and list(corner.get_ydata()) == [0.1, 0.1, 0]
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [2, 0.5]
    assert axes.get_title(loc="left") == "a title with $ and _" and bar.get_ylabel() == "tokens"


def test_landscapes_that_are_compared_have_one_scale():
    assert landscape_figure(landscape(4), most=900).axes[0].images[0].norm.vmax == 900


def test_a_landscape_without_tokens():
    nothing = {**landscape(0), "density": [[0] * 40] * 80, "tokens": 0, "conflicts": 0}
    assert landscape_figure(nothing).axes[0].texts[0].get_text().endswith("0.0 %")


def test_windows_are_merge_windows():
    one, two = ({"first_step": 10 * i + 1, "step": 10 * i + 10, **landscape(100, seed=i)} for i in range(2))
    both = merge_windows([one, two])
    assert (both["first_step"], both["step"], both["tokens"], both["conflicts"]) == (1, 20, 8000, 200)
    assert np.array_equal(both["density"], np.array(one["density"]) + np.array(two["density"]))
    assert sum(both["gate"]) == 8000


def test_gates_are_shares():
    figure = gate_figure({"first": landscape(400), "last": landscape(0)})
    first, last = figure.axes[0].patches
    assert first.get_data().values.sum() == pytest.approx(100) and last.get_data().values.sum() == pytest.approx(100)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["first", "last"]


def test_pareto(tmp_path):
    import json

    document = json.loads((compare_folder(tmp_path / "c") / "compare.json").read_text())
    axes = pareto_figure(document).axes[0]
    # smaller is better on both: right and up are smaller
    assert axes.xaxis_inverted() and axes.yaxis_inverted()
    means = {one.get_label(): one.lines[0].get_xydata()[0].tolist() for one in axes.containers}
    assert list(means) == ["none", "eaft", "conflict-mask"]
    assert means["eaft"] == pytest.approx([1.685, 24.557], abs=0.001)
    seeds = axes.lines[0].get_xydata()
    assert seeds.tolist() == [
        [arm["scores"][0]["value"], arm["scores"][2]["value"]] for arm in document["arms"] if arm["label"] == "none"
    ]
    (star,) = (line for line in axes.lines if line.get_label() == "before training")
    assert star.get_xydata()[0].tolist() == [document["base"][0]["value"], document["base"][2]["value"]]
    # a spread of one standard deviation over seeds, on both axes
    across, up = (lines.get_segments()[0] for lines in axes.containers[1].lines[2])
    assert across[1][0] - across[0][0] == pytest.approx(2 * document["table"][1]["target"]["sd"])
    assert up[1][1] - up[0][1] == pytest.approx(2 * document["table"][1]["general"]["sd"])


def test_curves_show_what_was_logged():
    rows = metrics(12)
    figures = {curve.name: curve_figure(curve, rows) for curve in CURVES}
    high, low = figures["groups"].axes[0].lines
    assert list(high.get_xdata()) == list(range(1, 13)) and high.get_ydata()[0] == pytest.approx(3 + 11 / 12)
    # what was not known at step 2 is no zero
    assert list(low.get_xdata()) == [1, *range(3, 13)]
    assert [line.get_label() for line in figures["loss"].axes[0].lines] == ["training", "entropy of the model"]
    assert curve_figure(CURVES[0], []) is None and gate_over_time(rows[:1]) is None
    bands = gate_over_time(rows).axes[0].collections
    assert len(bands) == 10


def test_a_long_training_is_means_of_neighbours():
    rows = [{"step": step, "x": float(step % 2)} for step in range(1, 2 * POINTS + 1)]
    steps, values = series(rows, "x")
    assert len(steps) == POINTS and set(values) == {0.5} and steps[0] == 1.5
    steps, values = series(rows[:3], "x")
    assert list(values) == [1, 0, 1]


def test_a_change_beyond_the_axis_is_an_arrow():
    axes = changes_figure([("a", 40.0), ("b", -0.9), ("c", -1.1), ("d", float("-inf"))]).axes[0]
    marks = [line for line in axes.lines if line.get_marker() not in ("", "None", None)]
    assert [(mark.get_marker(), mark.get_xdata()[0]) for mark in marks] == [
        (">", 4),
        ("o", -0.9),
        ("o", -1.1),
        ("<", -4),
    ]
    assert [mark.get_fillstyle() for mark in marks] == ["full", "none", "full", "full"]


def test_a_figure_gets_into_a_page(tmp_path):
    with styled():
        figure, axes = new_figure()
        axes.plot([0, 1], [0, 1], color=INK, label="<a> & $b$ #000000 url(#x)")
        axes.legend()
    svg = save_figure(figure, tmp_path, "mine")
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    alone = (tmp_path / "mine.svg").read_text()
    assert alone.startswith("<?xml") and INK in alone and "var(" not in alone
    assert svg.startswith("<svg ") and "xmlns" not in svg and "<style" not in svg and "http" not in svg
    assert "stroke: var(--ink)" in svg and INK not in svg
    # text is text, in the page's font, and is not touched
    assert ">&lt;a&gt; &amp; $b$ #000000 url(#x)</text>" in svg and "DejaVu" not in svg
    assert 'id="mine-' in svg and 'id="figure_1"' not in svg
    assert plt.get_fignums() == []
    assert {path.name for path in tmp_path.iterdir()} == {"mine.png", "mine.svg"}


def test_words():
    assert visible(" Oslo\n") == "␣Oslo⏎" and visible("  ") == "␣␣" and visible("a b") == "a b" and visible("") == ""
    assert clip("abcdef", 3, file="f") == "abc … (3 more characters in f)" and clip("abc", 3, file="f") == "abc"
    assert start_of("abcdef", 3) == "abc …" and end_of("abcdef", 3) == "… def"
    assert listing(["a"]) == "a" and listing(["a", "b, c", "d"]) == "a, “b, c” and d"
