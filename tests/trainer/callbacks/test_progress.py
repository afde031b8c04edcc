"""The display is driven with the calls a trainer makes, and once by a real (tiny, resumed) trainer."""

import io
import logging
import re
import sys

import pytest
import torch
from rich.console import Console
from transformers import (
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging as transformers_logging

from eaftdrope.trainer.callbacks.progress import ProgressCallback, use_progress_display
from tests.tiny_models import SMALLEST, tiny_llama

LOGS = {
    "loss": 0.2134,
    "grad_norm": 1.0,
    "eaft/cross_entropy": 0.5123,
    "eaft/gate_mean": 0.311,
    "eaft/conflict_share": 0.0123,
    "eaft/tokens_per_second": 1212.4,
}
CURSOR_UP = "\x1b[1A"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Run:
    """A callback with the arguments that a trainer hands over."""

    def __init__(self, console, *, max_steps=25, step=0, main=True):
        self.clock = Clock()
        self.callback = ProgressCallback(console, clock=self.clock)
        self.args = TrainingArguments("runs/x", report_to=[], use_cpu=True)
        self.state = TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=main)
        self.control = TrainerControl()

    def send(self, event, **kwargs):
        getattr(self.callback, event)(self.args, self.state, self.control, **kwargs)

    def step(self, step, *, seconds=0.0, **logs):
        self.clock.now += seconds
        self.state.global_step = step
        self.send("on_step_end")
        if logs:
            self.send("on_log", logs=logs)


@pytest.fixture
def plain():
    return Console(file=io.StringIO(), width=40)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Console(file=Terminal(), force_terminal=True, width=100, color_system="standard")


def test_plain_lines(plain):
    run = Run(plain)
    run.send("on_train_begin")
    run.step(10, seconds=43.0, **LOGS)
    run.send("on_log", logs={"eval_loss": 0.512, "eval_runtime": 3.2, "eval_entropy": 0.04, "epoch": 0.5})
    run.send("on_save")
    run.step(25, seconds=60.0, loss=0.0)
    run.send("on_log", logs={"train_runtime": 65.0, "train_loss": 0.1, "total_flos": 1e12})
    run.send("on_train_end")
    # One log is one line, though the console is only 40 columns wide.
    assert plain.file.getvalue().splitlines() == [
        "step 10/25  loss 0.213  ce 0.512  gate 0.31  conflicts 1.2 %  tok/s 1,212  eta 1:05",
        "evaluation at step 10: loss 0.512  entropy 0.04",
        "saved runs/x/checkpoint-10",
        "step 25/25  loss 0.000  eta 0:00",
        "finished at step 25/25: 25 steps in 1:43",
    ]


def test_time_left_counts_only_the_steps_of_this_run(plain):
    run = Run(plain, max_steps=3000, step=1000)
    run.send("on_train_begin")
    run.step(1010, seconds=20.0, loss=2.5e-4)
    run.send("on_train_end")
    # 2 s a step, 1990 steps to go: 3980 s. Counting the 1000 earlier steps would give 39 s.
    assert plain.file.getvalue().splitlines() == [
        "resumed after step 1000/3000",
        "step 1010/3000  loss 0.00025  eta 1:06:20",
        "stopped at step 1010/3000: 10 steps in 0:20",
    ]


def test_log_before_the_first_step_has_no_time_left(plain):
    run = Run(plain)
    run.send("on_train_begin")
    run.send("on_log", logs={"loss": 1.0})
    assert plain.file.getvalue() == "step 0/25  loss 1.000  eta -:--\n"


@pytest.mark.parametrize("kind", ["plain", "terminal"])
def test_other_processes_show_nothing(kind, request):
    console = request.getfixturevalue(kind)
    run = Run(console, main=False)
    run.send("on_train_begin")
    run.step(10, **LOGS)
    run.send("on_save")
    run.send("on_train_end")
    assert console.file.getvalue() == ""


def _screen(console):
    """Return the display as last drawn, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[mlh]", "", console.file.getvalue())
    frames = re.split(r"(?:\x1b\[1A|\x1b\[2K|\r)+", text)
    return [line.rstrip() for line in frames[-1].splitlines() if line.strip()]


def test_terminal_keeps_the_last_rows(terminal):
    run = Run(terminal)
    run.send("on_train_begin")
    for step in range(1, 9):
        run.step(step, seconds=1.0, **LOGS)
    run.send("on_log", logs={"eval_loss": 0.512})
    run.send("on_save")
    run.step(9, seconds=1.0)
    run.send("on_train_end")
    rows = _screen(terminal)
    assert rows[0].split() == ["step", "loss", "ce", "gate", "conflicts", "tok/s"]
    assert [row.split()[0] for row in rows[1:7]] == ["3", "4", "5", "6", "7", "8"]
    assert rows[6].split() == ["8", "0.213", "0.512", "0.31", "1.2", "%", "1,212"]
    assert rows[7].lstrip("━╸╺ ").split() == ["step", "9/25", "elapsed", "0:09", "eta", "0:16"]
    assert rows[8:] == [
        "evaluation at step 8: loss 0.512",
        "saved runs/x/checkpoint-8",
        "stopped at step 9/25: 9 steps in 0:09",
    ]


def test_terminal_says_what_it_is_doing(terminal):
    run = Run(terminal)
    run.send("on_train_begin")
    run.control.should_save = True
    run.step(5)
    run.send("on_prediction_step", eval_dataloader=[0, 1, 2])
    run.callback._live.refresh()
    assert _screen(terminal)[-1] == "evaluating 1/3 ..."
    run.send("on_evaluate")
    run.callback._live.refresh()
    assert _screen(terminal)[-1] == "saving checkpoint-5 ..."
    run.callback.close()


def test_a_narrow_terminal_never_wraps(terminal):
    terminal.width = 50
    run = Run(terminal, max_steps=100_000)
    run.send("on_train_begin")
    run.step(99_000, seconds=5e5, **LOGS)
    run.send("on_log", logs={"eval_loss": 0.5, "eval_a_metric_with_a_long_name": 0.5, "eval_another_one": 0.5})
    run.callback.close()
    rows = _screen(terminal)
    assert len(rows) == 4
    assert all(len(row) <= 50 for row in rows)


def test_warnings_and_prints_go_above_the_display_and_streams_come_back(terminal, monkeypatch):
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    output = sys.stdout
    handler = logging.StreamHandler()  # as transformers makes its own: holding the real stream
    logger = logging.getLogger("test_progress")
    logger.propagate = False
    logger.addHandler(handler)
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        run = Run(terminal)
        run.send("on_train_begin")
        assert not transformers_logging.is_progress_bar_enabled()
        logger.warning("from a logger")
        print("from a print")
        print("from stderr", file=sys.stderr)
        run.callback.close()
        run.callback.close()
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    shown = terminal.file.getvalue()
    assert error.getvalue() == "afterwards\n"
    assert all(text in shown for text in ("from a logger", "from a print", "from stderr"))
    assert sys.stdout is output and sys.stderr is error and handler.stream is error
    assert transformers_logging.is_progress_bar_enabled() == bars


def test_error_output_to_a_file_stays_there(terminal, monkeypatch):
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    run = Run(terminal)
    run.send("on_train_begin")
    print("a warning", file=sys.stderr)
    run.callback.close()
    assert error.getvalue() == "a warning\n"
    assert "a warning" not in terminal.file.getvalue()


def test_no_color(terminal, monkeypatch):
    colour = re.compile(r"\x1b\[[0-9;]*[39][0-7]m")

    def shown(console):
        run = Run(console)
        run.send("on_train_begin")
        run.step(10, **LOGS)
        run.callback.close()
        return console.file.getvalue()

    assert colour.search(shown(terminal))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(shown(Console(file=Terminal(), force_terminal=True, width=100, color_system="standard")))


def test_a_pipe_with_forced_colours_gets_plain_lines():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    run = Run(console)
    run.send("on_train_begin")
    run.step(10, seconds=1.0, loss=0.5)
    run.send("on_train_end")
    assert CURSOR_UP not in console.file.getvalue()
    assert console.file.getvalue().splitlines() == [
        "step 10/25  loss 0.500  eta 0:02",
        "stopped at step 10/25: 10 steps in 0:01",
    ]


def test_real_trainer_replaces_the_bar_and_resumes(tmp_path, capsys):
    def trainer(**options):
        model = tiny_llama(**SMALLEST, vocab_size=32)
        rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(8)]
        args = TrainingArguments(
            str(tmp_path), max_steps=4, logging_steps=2, save_steps=2, report_to=[], use_cpu=True,
            per_device_train_batch_size=2, **options,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=rows)

    first = trainer()
    use_progress_display(first)
    kinds = [type(callback) for callback in first.callback_handler.callbacks]
    assert kinds.count(ProgressCallback) == 1 and DEFAULT_PROGRESS_CALLBACK not in kinds
    first.train()
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d.]+  eta.*|in [\d:]+$", "#", line) for line in lines] == [
        "step 2/4  loss #",
        f"saved {tmp_path}/checkpoint-2",
        "step 4/4  loss #",
        f"saved {tmp_path}/checkpoint-4",
        "finished at step 4/4: 4 steps #",
    ]
    second = trainer(disable_tqdm=True)
    use_progress_display(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resumed after step 2/4"
    assert lines[-1].startswith("finished at step 4/4: 2 steps in ")
    assert len(lines) == 4
