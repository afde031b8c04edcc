"""Every recipe for a CPU as it is shipped: its model and its data, offline, for a step or two; only sizes are smaller."""

import json
import math

import pytest

from eaftdrope.cli.recipes import shipped_recipes
from eaftdrope.recipe import load_recipe
from tests.tiny_run import train

SHIPPED = shipped_recipes()
TEXT = "drope/smollm2_135m"
READER = "ttt/smollm2_135m"
ROOT = "rlm/smollm2_root"
PIPELINES = ("pipelines/full", "pipelines/full_smollm2", "pipelines/drope_then_eaft_cpu")
ROWS = ("quickstart", "math_cpu", "medical_cpu", "tool_use_cpu")
# a step of one row
STEP = ("train.epochs=null", "train.steps=1", "train.batch_size=1", "train.accumulation=1", "data.max_length=256")
NOTHING_MEASURED = ("probes.target=[]", "probes.general=[]")
# one token each, so that what is measured is read from the model but costs little
MEASURED = (
    "probes.target=[{held_out_loss: {limit: 2}}, {numeric_answers: {limit: 1, max_new_tokens: 1}}]",
    "probes.general=[{perplexity: {max_tokens: 256}}, {multiple_choice: {limit: 2}}, "
    "{agreement: {limit: 1, max_new_tokens: 1}}]",
)


def test_these_are_all_that_need_no_gpu():
    small = {name for name in SHIPPED if "smollm2-135m" in load_recipe(SHIPPED[name]).model.reference}
    assert small == {*ROWS, TEXT, READER, ROOT, *PIPELINES}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_trains_its_model_on_its_rows(name, tmp_path, monkeypatch):
    # the working directory has no data
    monkeypatch.chdir(tmp_path)
    measured = MEASURED if name == "math_cpu" else NOTHING_MEASURED
    ended = train(SHIPPED[name], *STEP, *measured, f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    (loss,) = losses(run)
    # of a pretrained model, weighted with a gate between 0 and 1
    assert 0 < loss < 3
    if measured is MEASURED:
        after = {score["metric"]: score["value"] for score in json.loads((run / "probes_after.json").read_text())}
        assert 0.5 < after["held-out loss"] < 4 and 10 < after["perplexity"] < 100


@pytest.mark.end_to_end
def test_the_recipe_with_text_recalibrates_on_the_novels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {
        "tokens": 512,
        "data.max_length": 256,
        "data.train": [{"path": "package:novels", "limit": 3}],
        "data.held_out": 0.34,
        "train.batch_size": 1,
        "recovery.max_tokens": 256,
        "recovery.every": 1,
    }
    settings = [f"recalibrate.{key}={json.dumps(value)}" for key, value in smaller.items()]
    nothing = [f"recalibrate.{entry}" for entry in NOTHING_MEASURED]
    ended = train(SHIPPED[TEXT], *settings, *nothing, f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    points = json.loads((tmp_path / "run/recalibrate/recovery.json").read_text())["points"]
    assert [point["tokens"] for point in points] == [0, 256, 512]
    # dropped, it has lost most; two steps bring some of it back
    assert points[0]["recovery"] < 0.5 and math.isfinite(points[-1]["perplexity"])
    assert load_recipe(SHIPPED[TEXT]).recalibrate.data.train[0].path == "package:novels"


@pytest.mark.end_to_end
def test_the_recipe_of_test_time_training_reads_the_novels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {
        "data.train": [{"path": "package:novels", "limit": 3}],
        "data.held_out": 0.34,
        "data.max_length": 256,
        "window": 128,
        "chunk": 64,
        "fast_blocks": 2,
        "train.steps": 1,
    }
    settings = [f"ttt.{key}={json.dumps(value)}" for key, value in smaller.items()]
    nothing = [f"ttt.{entry}" for entry in NOTHING_MEASURED]
    ended = train(SHIPPED[READER], *settings, *nothing, f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    run = tmp_path / "run" / "ttt"
    (loss,) = losses(run)
    # of a pretrained model, on novels
    assert 2 < loss < 6
    assert (run / "ttt.safetensors").is_file() and (run / "model.safetensors").is_file()


@pytest.mark.end_to_end
def test_the_recipe_of_a_root_learns_from_runs_that_it_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probe = {"rlm_tasks": {"tasks": ["needle"], "limit": 1, "chars": 2_000, "iterations": 1, "max_new_tokens": 16}}
    smaller = {
        "data.train.limit": 16,
        "data.held_out": None,
        "train.learning_rate": 2e-3,
        "train.warmup_steps": 0,
        "probes": {"target": [probe, {"rlm_tasks": {**probe["rlm_tasks"], "phrasings": "test"}}], "general": []},
        "output.dir": str(tmp_path / "run"),
    }
    ended = train(SHIPPED[ROOT], *(f"{key}={json.dumps(value)}" for key, value in smaller.items()))
    assert ended.code == 0, ended.out
    first, *_, last = losses(tmp_path / "run")
    assert first > 1 > last
    after = {score["metric"]: score["value"] for score in json.loads((tmp_path / "run/probes_after.json").read_text())}
    # a fence is what a root learns first
    assert after["needle: wrote a block"] == after["needle, unseen phrasings: wrote a block"] == 1.0
