"""Context figures show the numbers of their document, and exist only for metrics that were measured."""

import math

import matplotlib.pyplot as plt
import pytest

from eaftdrope.evaluate.long_context.table import COLUMNS, csv_of, rows_of
from eaftdrope.report.figures import context as figures

LENGTHS = (1024, 2048)


def cell(model, arm, probe, length, result):
    return {"model": model, "arm": arm, "probe": probe, "length": length, "seconds": 1.0, "result": result}


def needles(right, asked=1, depths=(0.0, 1.0)):
    """`right[d]` of two trials are right at depth d."""
    outcomes = [
        {"depth": depth, "found": asked if i < hits else 0, "asked": asked, "answer": ""}
        for depth, hits in zip(depths, right)
        for i in range(2)
    ]
    return {"outcomes": outcomes}


def losses(nats):
    """Two windows of two parts, `nats` a token."""
    return {"joined": False, "sums": [[[nats * 10, 10], [2 * nats * 10, 10]]] * 2}


MASS = {"peak": 0.1, "near": 0.2, "outside": 0.7}


def attention(near):
    best = {**MASS, "near": 0.9}
    return {
        "length": 1024, "trials": 2, "mean": {**MASS, "near": near}, "best": best, "best_layer": 1, "best_head": 3,
        "uniform": 0.01,
    }  # fmt: skip


@pytest.fixture
def document(monkeypatch):
    monkeypatch.setattr("eaftdrope.evaluate.long_context.perplexity.BUCKETS", 2)
    cells = []
    for model, arm in (("a", "as is"), ("a", "crop"), ("b", "as is")):
        for length in LENGTHS:
            lost = arm == "crop" and length == 2048
            cells.append(cell(model, arm, "niah", length, needles((0, 2) if lost else (2, 2))))
            cells.append(cell(model, arm, "multi-query", length, needles((1,), 4, (None,))))
            cells.append(cell(model, arm, "perplexity", length, losses(3.0)))
            if arm != "crop":
                cells.append(cell(model, arm, "attention", length, attention(0.3)))
    settings = {
        "models": [{"name": name, "trained_length": 1024} for name in "ab"],
        "text": {"name": "novel.txt"},
        "dtype": "float32",
    }
    return {"settings": settings, "about": {"device": "a CPU", "date": "2026-01-02T03:04:05"}, "cells": cells}


def test_rows(document):
    rows = rows_of(document)
    assert all(list(row) == list(COLUMNS) for row in rows)

    def find(**known):
        (row,) = [row for row in rows if all(row[name] == value for name, value in known.items())]
        return row

    crop = find(model="a", arm="crop", probe="niah", length=2048, at=None)
    assert (crop["value"], crop["n"], crop["multiple"], crop["metric"]) == (0.5, 4, "2x", "accuracy")
    assert (crop["low"], crop["high"]) == (pytest.approx(0.15, abs=0.001), pytest.approx(0.85, abs=0.001))
    assert find(model="a", arm="crop", probe="niah", length=2048, at="0.000")["value"] == 0.0
    assert find(model="b", probe="multi-query", length=1024, metric="recall")["value"] == 0.5
    assert find(model="b", probe="perplexity", length=1024, at=None)["value"] == pytest.approx(math.exp(4.5))
    assert find(model="b", probe="perplexity", length=1024, at="512-1024")["value"] == pytest.approx(math.exp(6))
    assert find(model="b", probe="attention", length=1024, metric="near, best head")["value"] == 0.9
    lines = csv_of(rows).splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == len(rows) + 1
    assert "a,crop,1024,niah,2048,2x,accuracy,,0.5,0.150039,0.849961,,4" in lines


def test_heat_maps(document):
    figure = figures._heat_maps(rows_of(document))
    panels = [axes for axes in figure.axes if axes.images]
    assert [panel.get_title() for panel in panels] == ["a, as is", "a, crop", "b, as is"]
    shares = panels[1].images[0].get_array().tolist()
    assert shares == [[1.0, 0.0], [1.0, 1.0]]
    assert [text.get_text() for text in panels[1].texts] == ["100", "0", "100", "100"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["1,024\n1x", "2,048\n2x"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0 %", "100 %"]
    plt.close(figure)


def test_curves(document):
    figure = figures._accuracies(rows_of(document))
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["niah", "multi-query"]
    # one error-bar container per arm
    lines = {line.get_label(): line for line in figure.axes[0].containers}
    assert list(lines) == ["a, as is", "a, crop", "b, as is"]
    assert list(lines["a, crop"].lines[0].get_ydata()) == [1.0, 0.5]
    plt.close(figure)


def test_one_model_is_named_below(document, tmp_path):
    document["settings"]["models"] = document["settings"]["models"][:1]
    document["cells"] = [cell for cell in document["cells"] if cell["model"] == "a"]
    figure = figures._accuracies(rows_of(document))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["as is", "crop"]
    assert figures._caption(document, figure) == "a; text: novel.txt; a CPU, float32; 2026-01-02"
    plt.close(figure)


def test_only_what_was_measured_is_drawn(document):
    drawn = figures.context_figures(document, rows_of(document))
    assert list(drawn) == [
        "probe_needles_by_depth",
        "probe_needles_by_length",
        "probe_perplexity_by_length",
        "probe_perplexity_by_position",
        "probe_attention_by_length",
    ]
    document["cells"] = [cell for cell in document["cells"] if cell["probe"] == "perplexity"]
    drawn = figures.context_figures(document, rows_of(document))
    assert list(drawn) == ["probe_perplexity_by_length", "probe_perplexity_by_position"]
    assert figures.context_figures(document | {"cells": []}, []) == {}
    plt.close("all")


def test_temperature(tmp_path):
    def fit(length, beta, clear):
        tried = [{"beta": b, "perplexity": 20 + 30 * (b - beta) ** 2} for b in (0.9, 1.0, beta, 1.7)]
        return {
            "length": length, "beta": beta, "perplexity": 20.0, "perplexity_at_1": tried[1]["perplexity"],
            "distinguishable": clear, "tried": tried,
        }  # fmt: skip

    document = {
        "model": "m", "text": "t", "windows": 8, "trained_length": 512, "slope": 0.36,
        "fits": [fit(1024, 1.25, True), fit(2048, 1.4, False)],
    }  # fmt: skip
    figures.draw_temperature(document, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG") and plt.get_fignums() == []
    figure, axes = plt.subplots()
    figures._betas(axes, document)
    first, second, line, _ = axes.lines
    assert (list(first.get_xydata()[0]), list(second.get_xydata()[0])) == ([1024, 1.25], [2048, 1.4])
    assert (first.get_fillstyle(), second.get_fillstyle()) == ("full", "none")
    assert line.get_ydata()[-1] == pytest.approx(1 + 0.36 * math.log(4)) and line.get_label() == "1 + 0.360 ln(s)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["512\n1x", "1,024\n2x", "2,048\n4x"]
    plt.close(figure)
