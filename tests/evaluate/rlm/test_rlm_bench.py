"""`eaftdrope rlm bench`: its plan, its trials with scripted models, resuming, tables, the crossover."""

import io
import json

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.plan import BenchOptions, make_plan, parse_chars
from eaftdrope.evaluate.rlm.results import BenchResults
from eaftdrope.evaluate.rlm.run import run_plan
from eaftdrope.evaluate.rlm.table import (
    cells_of,
    cost_table,
    crossover,
    crossover_text,
    percentile,
    score_table,
    share,
    step_table,
)
from eaftdrope.evaluate.rlm.trials import ARMS, TaskTrial, run_trials
from eaftdrope.evaluate.table import as_table
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.rows import RowFilters, training_rows
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.task import NAMES
from tests.tiny_models import save_model

FIND = r"""```repl
import re
found = re.findall(r"magic number for {key} is (\d+)", context)
answer["content"] = found[0]
answer["ready"] = True
```"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("bench") / "model"))


def root(messages):
    """Finds needles, whatever the phrasing of their query; else it gives up."""
    query = messages[-1]["content"].split("\n")[0]
    key = next((name for name in NAMES["test"] if name in query), None)
    return FIND.replace("{key}", key) if key else "FINAL(nothing)"


def options(model, **changed):
    return BenchOptions(**{"model": model, "tasks": ("needle",), "lengths": "2k,8k", "trials": 12, **changed})


def measured(folder, plan, answer=root, **changed):
    results = BenchResults(folder, plan, **changed)
    results.begin({"date": "today"}, "eaftdrope rlm bench")
    scripted = ScriptedModel(answer, window=1_000)
    run_plan(plan, results, models=(scripted, scripted))
    return results, scripted


def test_a_plan(model):
    plan = make_plan(options(model, lengths="1m,8k", trials=50))
    trials = {(cell.chars, cell.arm): cell.trials for cell in plan.cells}
    assert [cell.chars for cell in plan.cells] == [8_000] * len(ARMS) + [1_000_000] * len(ARMS)
    assert (trials[8_000, "rlm"], trials[8_000, "map-reduce"], trials[8_000, "summary"]) == (50, 10, 10)
    assert {trials[1_000_000, arm] for arm in ARMS} == {3}
    # the settings are JSON, and change with the weights
    assert json.loads(json.dumps(plan.settings)) == plan.settings
    assert list(plan.settings["checkpoints"]) == [model]
    assert make_plan(options("no/where", arms=("guess", "oracle"))).settings["checkpoints"] == {}


def test_every_problem_is_reported(model):
    wrong = options("./nowhere", tasks=("nedle",), arms=("rlm", ""), lengths="8q", names="unseen")
    with pytest.raises(UserError) as error:
        make_plan(wrong)
    for text in (
        "--tasks: 'nedle' is not one of needle, count",
        "Did you mean needle?",
        "--arms: '' is not one of rlm, plain",
        "--lengths: '8q' is not a length in characters",
        "--names: 'unseen' is not one of train, test",
        "./nowhere",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(("text", "chars"), [("8k,64K,1m", [8_000, 64_000, 1_000_000]), ("500, 100", [100, 500])])
def test_lengths(text, chars):
    assert parse_chars(text) == chars


def test_all_arms_with_a_scripted_model(tmp_path, model):
    results, _ = measured(tmp_path / "out", make_plan(options(model)))
    cells = cells_of(results.document)
    assert {key: len(trials) for key, trials in cells.items() if key[1] == 2_000} == {
        ("needle", 2_000, arm): 10 if arm in ("map-reduce", "summary") else 12 for arm in ARMS
    }
    assert [trial.score for trial in cells["needle", 8_000, "rlm"]] == [1.0] * 12
    assert [trial.score for trial in cells["needle", 8_000, "oracle"]] == [1.0] * 12
    # this root answers calls with code
    assert [trial.score for trial in cells["needle", 8_000, "plain"]] == [0.0] * 12
    assert all(trial.calls == 1 and trial.tokens > 0 for trial in cells["needle", 8_000, "rlm"])
    assert {trial.fence for trial in cells["needle", 8_000, "plain"]} == {None}
    # each trial has a journal with its score: training rows follow
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    files = sorted(results.journals.glob("*.jsonl"))
    assert sorted(scores) == [file.name for file in files] and set(scores.values()) == {1.0} and len(files) == 24
    assert len(training_rows(files, RowFilters(min_turns=1), scores=scores)[0]) == 24


def test_a_killed_measurement_resumes(tmp_path, model):
    plan = make_plan(options(model, arms=("rlm", "plain"), trials=15, lengths="2k"))
    whole, _ = measured(tmp_path / "whole", plan)

    calls = iter(range(1_000))

    def dies(messages):
        if next(calls) == 12:
            raise KeyboardInterrupt
        return root(messages)

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "out", plan, dies)
    begun = BenchResults(tmp_path / "out", plan)
    assert [len(begun.trials(cell)) for cell in plan.cells] == [10, 0]
    results, model_again = measured(tmp_path / "out", plan)
    # 15 and 15 trials, of which the first ten were stored
    assert len(model_again.seen) == 20

    def timeless(document):
        return [{**cell, "trials": [{**trial, "seconds": 0} for trial in cell["trials"]]} for cell in document["cells"]]

    assert timeless(results.document) == timeless(whole.document)
    # nothing is left to measure
    assert not measured(tmp_path / "out", plan)[1].seen


def test_other_settings_are_refused_and_can_be_replaced(tmp_path, model):
    plan = make_plan(options(model, arms=("guess",)))
    measured(tmp_path / "out", plan)
    other = make_plan(options(model, arms=("guess",), trials=3))
    with pytest.raises(UserError, match=r"an RLM bench with other settings \(different: trials\)"):
        BenchResults(tmp_path / "out", other)
    results, _ = measured(tmp_path / "out", other, overwrite=True)
    assert {len(cell["trials"]) for cell in results.document["cells"]} == {3}


@pytest.mark.parametrize(
    ("replies", "steps"),
    [
        (["I think it is 5."] * 2, (False, False, False, False)),
        (["```repl\nprint(contxt)\n```"] * 2, (True, False, False, False)),
        (["```repl\nprint(1)\n```"] * 2, (True, True, False, False)),
        (["FINAL(12)"], (False, False, True, False)),
        (["```repl\n1/0\n```", "```repl\nanswer['content'] = {gold}\nanswer['ready'] = True\n```"], (True,) * 4),
    ],
)
def test_success_is_split(replies, steps):
    task = make_task("needle", 0, 1_000)
    scripted = ScriptedModel([reply.replace("{gold}", task.gold) for reply in replies])
    rlm = RLM(scripted, limits=Limits(iterations=2))
    (trial,) = run_trials("rlm", [(0, task)], rlm)
    assert (trial.fence, trial.ran, trial.finished, trial.right) == steps
    assert (trial.stopped is None, trial.calls) == (steps[2], len(replies))


def test_an_empty_answer_of_a_run_that_did_not_finish_scores_nothing():
    """No pairs is the right answer of some tasks, and "" is how it is written."""
    task = next(task for task in (make_task("pairs", seed, 300) for seed in range(500)) if task.gold == "")
    (trial,) = run_trials("rlm", [(0, task)], RLM(ScriptedModel(["no"]), limits=Limits(iterations=1)))
    assert task.score("") == 1.0 and trial.score == 0.0


def trials(*scores, **values):
    return [TaskTrial(seed, score, True, 0, 0, 0.0, **values) for seed, score in enumerate(scores)]


def test_shares_and_percentiles():
    low, high = share(trials(*[1.0] * 7, 0.5, 0.0, 0.0), "right")[1:]
    assert (round(low, 3), round(high, 3)) == (0.397, 0.892)
    costs = list(range(1, 21))
    assert [percentile(costs, q) for q in (0.5, 0.95, 1.0)] == [10, 19, 20]
    assert percentile(costs[:1], 0.5) == percentile(costs[:1], 0.95) == 1


@pytest.mark.parametrize(
    ("rlm", "plain", "expected", "words"),
    [
        ((0.2, 0.8, 0.8), (0.9, 0.5, 0.1), (10, 20), "From between 10 and 20 characters on"),
        ((0.9, 0.8, 0.8), (0.2, 0.5, 0.1), (None, 10), "above that of a plain call at every measured length"),
        ((0.9, 0.8, 0.1), (0.2, 0.5, 0.1), (30, None), "not above that of a plain call at 30 characters, the longest"),
        ((0.9, 0.1, 0.8), (0.2, 0.5, 0.1), (20, 30), "From between 20 and 30"),
    ],
)
def test_crossover(rlm, plain, expected, words):
    cells = {("needle", 10 * n, "rlm"): trials(score) for n, score in enumerate(rlm, 1)}
    cells |= {("needle", 10 * n, "plain"): trials(score) for n, score in enumerate(plain, 1)}
    assert crossover(cells) == expected and words in crossover_text(cells)
    assert crossover(cells, "bm25") is None and crossover_text(cells, "bm25") is None


def test_tables():
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    cells = {
        ("needle", 8_000, "rlm"): trials(1.0, 0.5, fence=True, ran=False),
        ("needle", 8_000, "plain"): trials(0.0),
    }
    for table in (score_table(cells), step_table(cells), cost_table(cells)):
        console.print(as_table(table))
    text = " ".join(console.export_text().split())
    assert "0.75 · 50 (9–91)" in text and "0.00 · 0 (0–79, n 1)" in text
    assert "needle │ 8,000 │ 2 │ 100 (34–100) │ 0 (0–66) │ 100 (34–100) │ 50 (9–91)" in text
    assert step_table({("needle", 8_000, "plain"): trials(0.0)}).lines == []
