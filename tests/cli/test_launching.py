"""`train --launch N`: processes of the same command, whose exit codes and signals pass through."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from eaftdrope.cli.launching import is_launcher, start_processes
from eaftdrope.errors import UserError
from tests.tiny_run import make_project

SHORT = ("lora=null", "probes.target=[]", "probes.general=[]", "train.batch_size=2", "train.save_every=100000")


def test_only_the_command_itself_starts_processes(monkeypatch):
    assert is_launcher(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_launcher(2)
    with pytest.raises(UserError, match="--launch 4: a launcher has started 2 processes already"):
        is_launcher(4)


@pytest.mark.parametrize(
    ("ended", "code", "text"), [(2, 2, ""), (143, 143, ""), (-9, 3, "rank 1 (pid 77) was ended by SIGKILL.")]
)
def test_the_first_failure_decides_about_the_exit_code(monkeypatch, capsys, ended, code, text):
    failures = {
        1: ProcessFailure(local_rank=1, pid=77, exitcode=ended, error_file="/nowhere"),
        0: ProcessFailure(local_rank=0, pid=76, exitcode=1, error_file="/nowhere"),
    }
    failures[0].timestamp, failures[1].timestamp = 20, 10
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def launched(config, program):
        def run(*arguments):
            started.append((config.nproc_per_node, program, *arguments))
            raise ChildFailedError("python", failures)

        return run

    monkeypatch.setattr(api, "elastic_launch", launched)
    with pytest.raises(SystemExit) as stop:
        start_processes(2, ["train", "recipe.yaml", "--launch", "2"])
    assert stop.value.code == code
    assert started == [(2, sys.executable, "-m", "eaftdrope", "train", "recipe.yaml", "--launch", "2")]
    assert capsys.readouterr().err.startswith(text) and bool(text) == (code == 3)


@pytest.mark.engines
def test_signals_reach_both_processes_and_the_same_command_resumes(tmp_path):
    recipe, run = make_project(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "eaftdrope", "train", str(recipe), *SHORT, "train.steps=100000", "--launch", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    saved = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        while process.poll() is None and last_step(run) <= saved:
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, (out, err)
        assert (
            f"resuming from checkpoint-{saved} of 100000" in out
            if saved
            else "parallel      2 processes: replicas 2" in out
        )
        (checkpoint,) = (run / "checkpoints").glob("checkpoint-*") if not saved else newest(run)
        saved = int(checkpoint.name.removeprefix("checkpoint-"))
        assert (checkpoint / "manifest.json").is_file() and (checkpoint / "rng_state_1.pth").is_file()
        assert f"Interrupted at step {saved} of 100000. The same command resumes from checkpoint-{saved}." in err


def last_step(run):
    file = run / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def newest(run):
    return sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-1:]
