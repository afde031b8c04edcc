"""The comparison of roots: its plan, the meaning of its tables, and that it resumes."""

import json
import time
from types import SimpleNamespace

import pytest

from benchmarks.rlm.roots import plan, run, table
from benchmarks.rlm.roots.plan import RootCell, TrainedRoot
from benchmarks.rlm.roots.results import RootResults
from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.trials import TaskTrial
from eaftdrope.rlm.models import ScriptedModel

CE, EAFT, EXEMPT = plan.LOSSES


def trial(seed, right, **values):
    return TaskTrial(seed, float(right), True, 0, 0, 0.0, fence=True, ran=True, **values)


@pytest.fixture
def results(tmp_path):
    return RootResults(tmp_path / "roots.json", run.settings())


def test_the_outcome_is_measured_first_and_seed_by_seed():
    steps = list(plan.steps())
    assert [training and (training.arm, training.seed) for training, _ in steps[:5]] == [
        (CE, 1), (EAFT, 1), (EXEMPT, 1), (CE, 2), (EAFT, 2)
    ]  # fmt: skip
    assert len(steps) == 20 and steps[9][0] is None
    assert {cell.phrasings for _, cells in steps[:10] for cell in cells} == {"train"}
    keys = [cell.key for _, cells in steps for cell in cells]
    assert len(set(keys)) == 40


def test_arms_differ_in_their_loss_only(tmp_path):
    first, second, third = (run.recipe_of(TrainedRoot(arm, 1), tmp_path) for arm in plan.LOSSES)
    assert (first.loss.gate, second.loss.gate, third.loss.gate) == ("none", "eaft", "eaft")
    assert (second.loss.exempt, third.loss.exempt) == ([], plan.EXEMPT)
    for other in (second, third):
        assert other.model_dump(exclude={"loss"}) == first.model_dump(exclude={"loss"})
    assert first.data.train_sources()[0].limit == plan.ROWS and first.data.held_out is None


def test_the_sign_test_and_pairs(results):
    assert table.sign_test(0, 0) == 1.0 and table.sign_test(3, 3) == 1.0
    # 2 (1 + 8) / 2^8
    assert table.sign_test(1, 7) == table.sign_test(7, 1) == pytest.approx(18 / 256)
    for seed, right in ((1, 40), (2, 10)):
        for task in plan.TASKS:
            results.add_trials(
                RootCell(TrainedRoot(CE, seed), task, "train"), [trial(n, n < 25) for n in range(50)], 1.0
            )
            results.add_trials(
                RootCell(TrainedRoot(EAFT, seed), task, "train"), [trial(n, n < right) for n in range(50)], 1.0
            )
    assert table.paired(results, CE, EAFT, "train") == [(0, 30, 100), (30, 0, 100)]
    # of two seeds, and not of the third
    assert table.paired(results, CE, EXEMPT, "train") == []
    text = table.tables(results)
    assert f"| train | {CE} / {EAFT} | 30 | 30 | 200 | +30, -30 | 1 |" in text
    assert f"| {EAFT} | trained | needle | 100 | 100 (96–100) | 100 (96–100) | 100 (96–100) | 50 (40–60) |" in text


def test_it_resumes_and_refuses_other_settings(results, tmp_path, monkeypatch):
    """A stop after the first group; the second call measures the rest."""
    monkeypatch.setattr(plan, "TRIALS", 4)
    monkeypatch.setattr(plan, "GROUP", 2)
    monkeypatch.setattr(plan, "CHARS", 1_000)
    root = ScriptedModel(lambda messages: "FINAL(12345)")
    monkeypatch.setattr(run, "open_root", lambda reference: root)
    clock = iter(range(10))
    # only for this module
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock), process_time=time.process_time))
    cells = [RootCell(None, "needle", "train")]
    assert not run.measure(cells, plan.MODEL, results, 1, print)
    assert len(results.trials(cells[0])) == 2 and not results.done(cells[0])
    again = RootResults(results.file, run.settings() | {"trials": 50, "chars": 192_000})
    assert run.measure(cells, plan.MODEL, again, 10, print)
    assert [found.seed for found in again.trials(cells[0])] == [0, 1, 2, 3] and len(root.seen) == 4
    assert json.loads(results.file.read_text())["cells"][cells[0].key]["trials"][0]["finished"] is True
    with pytest.raises(UserError, match="other settings"):
        RootResults(results.file, run.settings() | {"rows": 1})
