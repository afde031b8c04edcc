"""Scores as lm-eval and inspect-ai write them; lm-eval's own table reads its file where it is installed."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from eaftdrope.evaluate.lm_eval import PROBE
from eaftdrope.evaluate.scores import Score, score_units
from eaftdrope.evaluate.suites.other_formats import write_other_formats
from eaftdrope.files import ResultFolder

DOCUMENT = {
    "schema": 1,
    "about": {
        "date": "2026-11-28T12:00:05+00:00",
        "device": "a CPU",
        "versions": {"eaftdrope": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0"},
    },
    "settings": {"setting": "cpu float32", "limit": 3},
    "models": [{"name": "tuned", "reference": "runs/a_b"}],
}
SCORES = [
    score_units("perplexity", "general", "perplexity", [(20.0, 10.0), (9.0, 3.0)], kind="exp", better="lower"),
    score_units(
        "multiple_choice", "general", "multiple choice", [(1.0, 1.0), (0.0, 1.0)], kind="share", better="higher"
    ),
    score_units(
        "multiple_choice", "general", "multiple choice, plain", [(1.0, 1.0)] * 2, kind="share", better="higher"
    ),
    score_units(
        "multiple_choice", "target", "multiple choice (medqa)", [(1.0, 1.0)] * 3, kind="share", better="higher"
    ),
    Score(PROBE, "general", "mmlu: acc", 0.5, 0.1, 40, "higher", "share"),
    Score(PROBE, "general", "mmlu: f (strict)", math.nan, None, 40, "lower"),
]


@pytest.fixture
def folder(tmp_path):
    results = ResultFolder(tmp_path / "out", "eval.json", "an evaluation", DOCUMENT["settings"], schema=1)
    results.document = DOCUMENT
    write_other_formats(results, {"tuned": SCORES})
    return results


def test_lm_eval(folder):
    (file,) = (folder.folder / "lm_eval").rglob("*.json")
    assert str(file.relative_to(folder.folder)) == "lm_eval/runs-a-b/results_2026-11-28T12-00-05+00-00.json"
    found = json.loads(file.read_text())
    assert found["results"]["perplexity"] == {
        "alias": "perplexity",
        "perplexity,none": SCORES[0].value,
        "perplexity_stderr,none": SCORES[0].stderr,
    }
    # a comma would end the metric's name
    assert found["results"]["multiple_choice"]["multiple choice plain,none"] == 1.0
    assert list(found["results"]) == ["perplexity", "multiple_choice", "multiple_choice (medqa)", "mmlu"]
    assert found["results"]["mmlu"]["acc,none"] == 0.5 and found["results"]["mmlu"]["f (strict)_stderr,none"] == "N/A"
    assert found["higher_is_better"]["mmlu"] == {"acc": True, "f (strict)": False}
    assert found["n-samples"]["multiple_choice (medqa)"] == {"original": 3, "effective": 3}
    assert (found["model_name"], found["config"]["model_args"]) == ("runs/a_b", "pretrained=runs/a_b")
    assert found["date"] == 1795867205.0 and found["config"]["device"] == "cpu"


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("lm_eval", "pytablewriter")),
    reason="lm-eval or its pytablewriter is not installed",
)
def test_lm_evals_own_table(folder):
    from lm_eval.utils import get_file_datetime, get_results_filenames, make_table

    (file,) = get_results_filenames([str(file) for file in (folder.folder / "lm_eval").rglob("*.json")])
    assert get_file_datetime(file) == "2026-11-28T12-00-05+00-00.json"
    table = make_table(json.loads(Path(file).read_text()))
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    # the table's writer decides on the digits
    shown = {(row[1], row[5]): (row[6], float(row[7]), float(row[9])) for row in rows[2:] if row[9] != "N/A"}
    value, stderr = SCORES[0].value, SCORES[0].stderr
    assert shown["perplexity", "perplexity"] == ("↓", pytest.approx(value, abs=1e-3), pytest.approx(stderr, abs=1e-3))
    assert shown["mmlu", "acc"] == ("↑", 0.5, 0.1)


def test_inspect_ai(folder):
    files = sorted((folder.folder / "inspect_ai").iterdir())
    assert [file.name.rpartition("_")[0] for file in files] == [
        f"2026-11-28T12-00-05+00-00_{task}"
        for task in ("mmlu", "multiple-choice-medqa", "multiple-choice", "perplexity")
    ]
    log = json.loads(files[3].read_text())
    assert (log["version"], log["status"], log["eval"]["model"]) == (2, "success", "eaftdrope/runs/a_b")
    (score,) = log["results"]["scores"]
    assert score["metrics"]["value"]["value"] == SCORES[0].value
    assert score["metrics"]["stderr"]["value"] == SCORES[0].stderr
    assert [sample["scores"]["perplexity"]["value"] for sample in log["samples"]] == [2.0, 3.0]
    log = json.loads(files[2].read_text())
    assert [score["name"] for score in log["results"]["scores"]] == ["multiple choice", "multiple choice, plain"]
    assert [sample["scores"]["multiple choice"]["value"] for sample in log["samples"]] == [1.0, 0.0]
    assert len({json.loads(file.read_text())["eval"]["eval_id"] for file in files}) == 4


def test_files_of_an_earlier_run_are_replaced_and_others_stay(folder):
    others = [folder.folder / "lm_eval" / "notes.json", folder.folder / "inspect_ai" / "notes.txt"]
    for file in others:
        file.write_text("mine")
    folder.document = {**DOCUMENT, "about": {**DOCUMENT["about"], "date": "2026-11-29T01:02:03+00:00"}}
    write_other_formats(folder, {"tuned": SCORES[:1]})
    names = [file.name for name in ("lm_eval", "inspect_ai") for file in (folder.folder / name).rglob("*.*")]
    assert sorted(name[:24] for name in names) == sorted(
        [
            "notes.json",
            "notes.txt",
            "results_2026-11-29T01-02-03+00-00.json"[:24],
            "2026-11-29T01-02-03+00-00_perp"[:24],
        ]
    )
