"""Signals, lost processes and moved runs: nothing is lost but the present step, and each ends in one message."""

import json
import os
import re
import signal
import sys
import time

import pytest

from tests import forked
from tests.tiny_run import make_project, metrics, results, train, train_in_a_shell, train_in_ranks

SHORT = ("probes.target=[]", "probes.general=[]")
# two processes that share the steps of one
HALF = ("train.batch_size=2", "lora.dropout=0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The results of a run that nothing has happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipe, *SHORT, f"output.dir={run}").code == 0
    return results(run)


def last_line(text):
    return text.splitlines()[-1]


# ---- signals ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step(recipe, undisturbed, tmp_path, number, code):
    command = (recipe, *SHORT, f"output.dir={tmp_path / 'run'}")
    ended = train(*command, moment="in step 3, after a checkpoint", signal_number=number)
    assert ended.code == code, ended.out
    assert last_line(ended.out) == "Interrupted at step 3 of 6. The same command resumes from checkpoint-3."
    assert "Traceback" not in ended.out
    again = train(*command)
    assert "resuming from checkpoint-3 of 6" in again.out and again.code == 0
    assert results(tmp_path / "run") == undisturbed


def test_sigterm_before_the_training(recipe, tmp_path):
    run = tmp_path / "run"
    ended = train(recipe, f"output.dir={run}", moment="while probing before", signal_number=signal.SIGTERM)
    assert ended.code == 143
    assert last_line(ended.out) == (
        "Interrupted while probing before training. The same command trains from the beginning."
    )


def _twice(*arguments):
    """Two signals within a step."""
    from eaftdrope.trainer import EAFTTrainer

    original = EAFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    EAFTTrainer.compute_loss = compute_loss
    forked.command_line("train", *arguments)


def test_a_second_ctrl_c_ends_at_once(recipe, tmp_path):
    ended = forked.run(_twice, str(recipe), *SHORT, f"output.dir={tmp_path / 'run'}")
    assert ended.code == 130
    assert last_line(ended.err) == "Interrupted at step 2 of 6. The same command resumes from checkpoint-2."


def test_a_save_by_the_clock(recipe, undisturbed, tmp_path):
    """At every step here: a minute is over before each."""
    run = tmp_path / "run"
    ended = train(recipe, *SHORT, f"output.dir={run}", "train.save_every=100", "train.save_every_minutes=0.0001")
    assert ended.code == 0, ended.out
    saved = {path.name for path in (run / "checkpoints").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in range(1, 7)}
    assert results(run) == undisturbed


# ---- a longer run ----


def test_a_lengthened_run_is_the_long_run(recipe, tmp_path):
    """Under a constant rate the two are the same; under another schedule the rate is the present one's from the next step."""
    constant, long, run = ("train.scheduler=constant", *SHORT), tmp_path / "long", tmp_path / "run"
    assert train(recipe, *constant, f"output.dir={long}").code == 0
    assert train(recipe, *constant, "train.steps=3", f"output.dir={run}").code == 0
    ended = train(recipe, *constant, f"output.dir={run}")
    assert ended.code == 0, ended.out
    assert f"{run}: train.steps was 3 and is 6: continued" in ended.out
    assert "resuming from checkpoint-3 of 6" in ended.out
    assert results(run) == results(long)


def test_the_rate_of_a_lengthened_run(recipe, tmp_path):
    run = tmp_path / "run"
    assert train(recipe, *SHORT, "train.steps=3", "train.scheduler=linear", f"output.dir={run}").code == 0
    assert train(recipe, *SHORT, "train.scheduler=linear", f"output.dir={run}").code == 0
    rates = [row["learning_rate"] for row in metrics(run)]
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3, 0.005, 0.01 / 3, 0.01 / 6])


# ---- several processes ----


def _signalled(rank, number, step, *arguments):
    """A rank that gets a signal in a step."""
    from eaftdrope.report import page
    from eaftdrope.trainer import EAFTTrainer
    from tests.tiny_run import no_report

    page._write = no_report
    original = EAFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if os.environ["RANK"] == str(rank) and self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    EAFTTrainer.compute_loss = compute_loss
    forked.command_line("train", *arguments)


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_on_all(recipe, tmp_path):
    """Agreed also in the middle of an accumulation; then moved to one process with twice the accumulation."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    shared = (recipe, *SHORT, "lora.dropout=0", f"output.dir={run}")
    two = forked.run_ranks(
        2, _signalled, 1, signal.SIGTERM, 3, *map(str, shared), "train.batch_size=1", "train.accumulation=2"
    )
    assert [rank.code for rank in two] == [143, 143], two
    assert last_line(two[0].err) == "Interrupted at step 3 of 6. The same command resumes from checkpoint-3."
    assert two[1].err == ""
    one = train(*shared, "train.batch_size=1", "train.accumulation=4")
    assert one.code == 0 and "resuming from checkpoint-3 of 6" in one.out, one.out
    assert train(*shared[:-1], f"output.dir={alone}").code == 0
    for row, other in zip(metrics(run), metrics(alone), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["num_tokens"] == other["num_tokens"]


@pytest.mark.slow
def test_a_killed_rank_is_named_in_one_message(recipe, tmp_path):
    run = tmp_path / "run"
    ranks = forked.run_ranks(
        2,
        _signalled,
        1,
        signal.SIGKILL,
        4,
        str(recipe),
        *SHORT,
        *HALF,
        f"output.dir={run}",
        "parallel.timeout_minutes=1",
    )
    assert [rank.code for rank in ranks] == [3, -signal.SIGKILL], ranks
    assert re.fullmatch(
        r"rank 1 \(pid \d+ on \S+\) no longer responds: killed, or stopped\. The same command resumes from checkpoint-2\.\n",
        ranks[0].err,
    )
    assert [rank.code for rank in train_in_ranks(recipe, *SHORT, *HALF, f"output.dir={run}")] == [0, 0]
    assert len(metrics(run)) == 6


@pytest.mark.engines
def test_the_main_process_killed(recipe, tmp_path):
    """It holds the store, so the others can only conclude that it is gone."""
    ranks = forked.run_ranks(
        2, _signalled, 0, signal.SIGKILL, 4, str(recipe), *SHORT, *HALF, f"output.dir={tmp_path}/run"
    )
    assert [rank.code for rank in ranks] == [-signal.SIGKILL, 3], ranks
    # torch's own warnings come first; a command started by a person turns them off before it loads torch
    assert last_line(ranks[1].err) == (
        "rank 0 no longer responds: killed, or stopped. The same command resumes from checkpoint-2."
    )
    assert "Traceback" not in ranks[1].err


@pytest.mark.engines
def test_a_stopped_rank_ends_the_run_within_the_timeout(recipe, tmp_path):
    files = [(tmp_path / f"out-{rank}", tmp_path / f"err-{rank}") for rank in range(2)]
    arguments = (str(recipe), *SHORT, *HALF, f"output.dir={tmp_path / 'run'}", "parallel.timeout_minutes=0.4")
    together = forked._rendezvous(2)
    processes = [
        forked.start(
            _signalled,
            1,
            signal.SIGSTOP,
            4,
            *arguments,
            out=out,
            err=err,
            **together,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank, (out, err) in enumerate(files)
    ]
    try:
        processes[0].join(240)
        assert processes[0].exitcode == 3, files[0][1].read_text()
        assert re.fullmatch(
            r"rank 1 \(pid \d+ on \S+\) no longer responds: killed, or stopped\. The same command resumes from "
            r"checkpoint-2\.\n",
            files[0][1].read_text(),
        )
    finally:
        processes[1].kill()


@pytest.mark.slow
def test_an_error_for_the_user_is_printed_once(recipe, tmp_path):
    """Of the same error in both, and of one that only one of them has, which ends both."""
    ranks = train_in_ranks(recipe, "loss.gate=talr", "data.train=empty.jsonl", f"output.dir={tmp_path / 'run'}")
    assert [rank.code for rank in ranks] == [2, 2]
    assert sorted(bool(rank.err) for rank in ranks) == [False, True]
    project = recipe.parent
    (project / "bad.jsonl").write_text("{}\n")
    ranks = train_in_ranks(recipe, "data.train=bad.jsonl", f"output.dir={tmp_path / 'run'}")
    assert [rank.code for rank in ranks] == [2, 2]
    assert sum("bad.jsonl:1" in rank.err for rank in ranks) == 1
    assert sorted(bool(rank.err) for rank in ranks) == [False, True], ranks


def _on_another_disk(patience, *arguments):
    from eaftdrope.run import launch

    launch._DISK_SECONDS = patience
    os.makedirs(os.environ["RANK"], exist_ok=True)
    os.chdir(os.environ["RANK"])
    forked.command_line("train", *arguments)


@pytest.mark.engines
def test_disks_that_are_not_shared_are_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks = forked.run_ranks(2, _on_another_disk, 0.5, str(recipe), *SHORT, *HALF, "output.dir=run")
    assert [rank.code for rank in ranks] == [2, 2], ranks
    assert re.fullmatch(
        r"rank 1: run is not the same folder on every machine: rank 1 \(on \S+\) does not see what rank 0 wrote there\. Set "
        r"output\.dir to a folder on a disk that all machines share\.\n",
        ranks[1].err,
    )
    assert ranks[0].err == ""
    assert not (tmp_path / "0" / "run").exists()


def _slow_probe(seconds, *arguments):
    from eaftdrope.evaluate.probes.perplexity import PerplexityProbe
    from eaftdrope.report import page
    from tests.tiny_run import no_report

    page._write = no_report
    original = PerplexityProbe.run

    def run(self, *args, **kwargs):
        time.sleep(seconds)
        return original(self, *args, **kwargs)

    PerplexityProbe.run = run
    forked.command_line("train", *arguments)


@pytest.mark.engines
def test_probes_are_shared_and_may_take_longer_than_the_timeout(recipe, tmp_path):
    """Each process measures some; the scores are those of one process, in its order."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    agreement = "{agreement: {limit: 2, max_tokens: 32, max_new_tokens: 4}}"
    probes = f"probes.general=[{{perplexity: {{files: [text.txt]}}}}, {agreement}, {{multiple_choice: {{limit: 4}}}}]"
    common = (str(recipe), "train.steps=2", "lora.dropout=0", probes)
    arguments = (*common, "train.batch_size=2", f"output.dir={run}", "parallel.timeout_minutes=0.2")
    ranks = forked.run_ranks(2, _slow_probe, 15, *arguments)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert train(*common, f"output.dir={alone}").code == 0
    before, expected = (json.loads((folder / "probes_before.json").read_text()) for folder in (run, alone))
    assert before == expected
    after, expected = (json.loads((folder / "probes_after.json").read_text()) for folder in (run, alone))
    assert [score["metric"] for score in after] == [score["metric"] for score in expected]
    for score, other in zip(after, expected):
        assert score["value"] == pytest.approx(other["value"], rel=1e-3)


ELASTIC = """
import os, signal, sys
from eaftdrope.cli import main
from eaftdrope.report import page
from eaftdrope.trainer import EAFTTrainer
from tests.tiny_run import no_report

page._write = no_report
original = EAFTTrainer.compute_loss

def compute_loss(self, *args, **kwargs):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

EAFTTrainer.compute_loss = compute_loss
main(["train", *sys.argv[1:]])
"""


@pytest.mark.engines
def test_torchrun_restarts_a_killed_worker(recipe, tmp_path):
    """The run ends as an undisturbed one; --overwrite deletes nothing at a restart."""
    (tmp_path / "elastic.py").write_text(ELASTIC)
    launch = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    arguments = (recipe, *SHORT, *HALF, f"output.dir={run}", "--overwrite")
    code, out, err = train_in_a_shell(
        *arguments, command=(*launch, str(tmp_path / "elastic.py")), ACCELERATE_USE_CPU="true", PYTHONPATH=root
    )
    assert code == 0, err
    assert "restarted by the launcher: --overwrite deletes nothing now" in out
    assert "resuming from checkpoint-2 of 6" in out
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert [rank.code for rank in train_in_ranks(recipe, *SHORT, *HALF, f"output.dir={whole}")] == [0, 0]
    # a fresh process lists the adapted modules in another order
    found, expected = ({**results(folder), "adapter_config.json": None} for folder in (run, whole))
    assert found == expected


# ---- the agreement of processes ----


AGREE = """
import sys
import torch
from torch import distributed
from eaftdrope.trainer.callbacks.stopping import StepAgreement
from tests.forked import end_together

distributed.init_process_group("gloo")
rank = distributed.get_rank()
now = StepAgreement(torch.device("cpu"))
later = StepAgreement(torch.device("cpu"), deferred=True)
steps = [(0, 0), (15 * rank, 0), (2 * (1 - rank), 1 - rank), (0, 0)]
assert [now.largest(step) for step in steps] == [(0, 0), (15, 0), (2, 1), (0, 0)]
assert [later.largest(step) for step in steps] == [(0, 0), (0, 0), (15, 0), (2, 1)]
end_together()
"""


def test_processes_agree_on_the_largest_numbers():
    """On an accelerator a step later: a step does not wait for the device."""
    for ended in forked.run_ranks(2, forked.program, AGREE):
        assert ended.code == 0, ended.err
