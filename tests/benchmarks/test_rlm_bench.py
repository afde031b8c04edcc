"""The measurements of the engine and of its peers, on little; and what the committed figures have to show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rlm import bench, engine, peers
from benchmarks.rlm.contestants import LIMITS
from benchmarks.rlm.peers import KILLED, TASKS, Contestant
from tests.rlm.boxes import BOXES, lacking

RESULTS = Path(peers.__file__).parent / "results"


@pytest.mark.parametrize("name", BOXES)
def test_a_sandbox_is_measured(name):
    if reason := lacking(name):
        pytest.skip(reason)
    found = engine.of_sandbox(name)
    assert found.keys() == {"start_ms", "call_ms", "ten_megabytes_ms"} and min(found.values()) > 0


def test_a_length_and_a_replay_are_measured(tmp_path):
    found = engine.of_length(100_000)
    assert 0 < found["root_prompt"] < 1000 and found["cpu_seconds"] > 0
    assert engine.of_replay(tmp_path)["replay_cpu_seconds"] > 0
    events = [json.loads(line)["event"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert events.count("call") == engine.REPLAYED_CALLS + 1


def test_cpu_seconds_of_processes_count():
    code = "import time\nwhile time.process_time() < 0.3: pass"
    assert engine.spent_by(lambda: subprocess.run([sys.executable, "-c", code], check=True)) >= 0.3


@pytest.mark.parametrize(
    ("task", "answer", "stopped", "calls"),
    [("result", "MAGIC NUMBER IS 4711", None, 10), ("calls", "", "sub_calls: 20 + 1 would pass 20", 20)],
)
def test_ours_in_a_process_of_its_own(tmp_path, task, answer, stopped, calls):
    found = Contestant("eaftdrope", sys.executable, None).run(TASKS[task], tmp_path)
    assert found["answer"].startswith(answer) and (found["stopped"], found["sub_calls"]) == (stopped, calls)
    assert (found["root_calls"], found["repeated"]) == (1, 0)


@pytest.mark.end_to_end
def test_a_killed_run_is_run_again(tmp_path):
    found = Contestant("eaftdrope", sys.executable, None).run(KILLED["one by one"], tmp_path, kill_at=3)
    assert found["answer"] == str([f"PART {number}" for number in range(peers.KILLED_CALLS)])
    # the root's reply came from the journal, and at most the call in flight was made again
    assert found["root_calls"] == 1 and found["repeated"] <= 1
    assert found["sub_calls"] == peers.KILLED_CALLS + found["repeated"]


def test_the_bench_of_a_root_before_and_after(tmp_path, capsys):
    cells = {(cell.task, cell.chars, cell.arm): cell for cell in bench.read_cells(bench.FOLDER)}
    for task in ("needle", "count"):
        for chars in (8_000, 64_000):
            before, after = (cells[task, chars, (model, "rlm")] for model in ("base", "root"))
            assert len(before.scores) == len(after.scores) == 50
            # no trial is right before, and after training even the lower bound is above six in ten
            assert before.right[0] == 0 and after.right[1] > 0.6
            assert cells[task, chars, ("base", "oracle")].right[0] == 1
    bench.bench(bench.FOLDER, tmp_path / "bench.png")
    assert "| needle | 8,000 | plain call | 50 | 0.48 | 48 % (35–61) | 2,938 |" in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_figures():
    found = json.loads((RESULTS / "engine.json").read_text())
    assert found["lengths"]["50000000"]["root_prompt"] < 1000
    assert found["lengths"]["10000000"]["cpu_seconds"] <= 1
    assert all(measured["ratio"] >= 2 for measured in found["batches"].values())
    engines = json.loads((RESULTS / "peers.json").read_text())["engines"]
    assert engines.keys() == LIMITS.keys()
    for name, measured in engines.items():
        assert measured["tasks"].keys() == TASKS.keys() and measured["tasks"]["result"]["reached"]
        assert measured["limits"] == list(LIMITS[name])
