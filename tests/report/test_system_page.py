"""The page of a pipeline from planted files: states in order, pairs over the same units only, answers with their cost."""

import json

import pytest

from eaftdrope.evaluate.scores import score_units, scores_to_json
from eaftdrope.report.page import write_report
from eaftdrope.report.system import collect_system, is_pipeline, states_of

WHOLE = ["pretrain", "drope", "recalibrate", "ttt"]


def loss(at, mean, step=0.0):
    units = [(mean + step * index, 1.0) for index in range(5)]
    return score_units(
        "long_loss", "general", f"nats per token at {at} x 64 tokens", units, kind="mean", better="lower"
    )


def held_out(mean, rows):
    units = [(mean * rows, float(rows))] * 3
    return score_units("held_out_loss", "target", "held-out loss", units, kind="mean", better="lower")


def plant(folder, stage, stages, before=None, after=None, status="finished"):
    (folder / stage).mkdir(parents=True)
    record = {"status": status, "recipe": {"stages": stages}, "processes": 1, "data": {}}
    (folder / stage / "run.json").write_text(json.dumps(record))
    for when, scores in (("before", before), ("after", after)):
        if scores:
            (folder / stage / f"probes_{when}.json").write_text(scores_to_json(scores))


@pytest.fixture
def run(tmp_path):
    """pretrain, drope, recalibrate, ttt; without-ttt finished, without-drope not."""
    run = tmp_path / "run"
    plant(
        run, "pretrain", WHOLE[:1], [held_out(7, 8), loss(1, 7), loss(4, 7)], [held_out(5, 8), loss(1, 5), loss(4, 6)]
    )
    plant(run, "drope", WHOLE[:2])
    plant(run, "recalibrate", WHOLE[:3], [held_out(9, 8), loss(1, 8)], [held_out(6, 8), loss(1, 5.5), loss(4, 5.25)])
    # other rows were held out
    plant(run, "ttt", WHOLE, [held_out(6, 16)], [held_out(5, 16), loss(1, 5.5, 0.5), loss(4, 5)])
    plant(run / "ablations" / "without-ttt", "pretrain", WHOLE[:1])
    plant(run / "ablations" / "without-ttt", "recalibrate", ["pretrain", "recalibrate"], [], [loss(1, 6)])
    plant(run / "ablations" / "without-drope", "pretrain", WHOLE[:1], [], [loss(1, 6)], status="running")
    logs = [{"step": step, "position/nll_0_16": 5.0, "position/nll_16_32": 5.0 - step / 4} for step in range(4)]
    (run / "ttt" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    answer = {"question": "Who <b>?", "answer": "Nobody.", "method": "ttt", "finished": True, "stopped": None}
    answer |= {
        "text_tokens": 200_000,
        "tokens": 200_100,
        "cpu_seconds": 61.5,
        "pieces": [[2049, 2049, None, 1.0], [4097, 2048, 3.25, 2.0]],
    }
    stopped = {**answer, "method": "rlm", "finished": False, "stopped": "seconds: 600 have passed", "pieces": []}
    (run / "ask").mkdir()
    (run / "ask" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (answer, stopped)))
    return run


def test_states_are_those_that_were_measured_in_order(run):
    assert is_pipeline(run)
    assert [state.label for state in states_of(run)] == ["start", "pretrain", "drope", "recalibrate", "ttt"]


def test_changes_are_over_the_same_units(run):
    found = collect_system(run)
    changes = {(change["stage"], change["metric"]): change for change in found["changes"]}
    # the rows that two stages held out are not the same
    assert ("recalibrate", "held-out loss") in changes and ("ttt", "held-out loss") not in changes
    short = changes["ttt", "nats per token at 1 x 64 tokens"]
    assert (short["from"], short["to"], short["difference"]) == (5.5, 6.5, 1.0)
    # the standard error of 0, 0.5, 1, 1.5, 2
    assert short["stderr"] == pytest.approx((2.5 / 4 / 5) ** 0.5)
    assert changes["drope", "nats per token at 1 x 64 tokens"]["difference"] == 3.0
    assert [ablation["name"] for ablation in found["ablations"]] == ["without-ttt"]
    assert [(change["from"], change["to"]) for change in found["ablations"][0]["changes"]] == [(6.5, 6.0)]
    assert found["positions"] == [["0 to 15", 5.0, 5.0], ["16 to 31", 5.0, 4.25]]


def test_the_page_has_every_part(run):
    page = write_report(run).read_text()
    assert json.loads((run / "system.json").read_text()) == json.loads(json.dumps(collect_system(run)))
    for text in (
        "Stages pretrain → drope → recalibrate → ttt; measured after pretrain, drope, recalibrate, ttt.",
        "nats per token by length",
        "256 tokens",
        "Who &lt;b&gt;?",
        "200,000",
        "none: seconds: 600 have passed",
        "0.98",
        "without-ttt: pretrain → recalibrate",
    ):
        assert text in page, text
    assert (run / "figures" / "system_nats.png").is_file()
    assert write_report(run).read_text() == page


def test_a_pipeline_that_has_just_begun(tmp_path):
    plant(tmp_path / "run", "pretrain", ["pretrain"], status="running")
    page = write_report(tmp_path / "run").read_text()
    assert "measured after no stage yet" in page and "Nothing was asked yet" in page
