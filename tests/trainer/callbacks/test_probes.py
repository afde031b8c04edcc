"""The callback of probes during training: when it measures, what it logs and keeps, what a resumed run drops."""

import json
from types import SimpleNamespace

from rich.console import Console

from eaftdrope.trainer.callbacks.probes import ProbesCallback
from eaftdrope.trainer.callbacks.progress import ProgressCallback


class Run:
    """Steps of a trainer as far as the callback sees them; the loss that is measured is 10 - step."""

    def __init__(self, path, *, step=0, main=True, log_every=1):
        self.state = SimpleNamespace(global_step=step, max_steps=6, is_world_process_zero=main)
        self.log_every, self.logs, self.models = log_every, [], []
        self.callback = ProbesCallback(path, self.measure, every=2)
        self.callback.on_train_begin(None, self.state, None)

    def measure(self, model):
        self.models.append(model)
        return [{"probe": "p", "metric": "held-out loss", "value": 10.0 - self.state.global_step, "stderr": 0.5}]

    def go(self, until):
        while self.state.global_step < until:
            self.callback.on_step_begin(None, self.state, None, model="model")
            self.state.global_step += 1
            control = SimpleNamespace(should_log=self.state.global_step % self.log_every == 0)
            self.callback.on_step_end(None, self.state, control)
            logs = {"loss": 1.0, "num_tokens": 50.0}
            # a log without training figures (an evaluation) takes nothing
            for log in ({"eval_loss": 1.0}, logs) if control.should_log else ():
                self.callback.on_log(None, self.state, None, logs=log, model="model")
                self.logs.append((self.state.global_step, log))
        return self


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_measured_at_the_start_and_now_and_then(tmp_path):
    path = tmp_path / "probes_during.jsonl"
    run = Run(path, log_every=3).go(5)
    kept = lines(path)
    assert [line["step"] for line in kept] == [0, 2, 4]
    assert kept[1]["scores"] == [{"probe": "p", "metric": "held-out loss", "value": 8.0, "stderr": 0.5}]
    assert run.models == ["model"] * 3
    # a step that is measured is logged
    assert [(step, log["probe/held-out loss"]) for step, log in run.logs if "loss" in log and step != 3] == [
        (2, 8.0),
        (4, 6.0),
    ]
    assert all("probe/held-out loss" not in log for step, log in run.logs if step == 3 or "eval_loss" in log)


def test_a_resumed_run_drops_what_it_measures_again(tmp_path):
    path = tmp_path / "probes_during.jsonl"
    Run(path).go(5)
    whole = lines(path)
    again = Run(path, step=2)
    assert lines(path) == whole[:2] and again.models == []
    again.go(5)
    assert lines(path) == whole


def test_the_other_processes_measure_and_write_nothing(tmp_path):
    run = Run(tmp_path / "probes_during.jsonl", main=False).go(3)
    assert len(run.models) == 2 and list(tmp_path.iterdir()) == []


def test_the_display_says_it_in_a_line_of_its_own(capsys):
    shown = Console(width=200, force_terminal=False)
    display = ProgressCallback(shown)
    state = SimpleNamespace(global_step=2, max_steps=6, is_world_process_zero=True)
    display.on_log(None, state, None, logs={"loss": 0.5, "probe/held-out loss": 0.25, "probe/perplexity": 12.3456})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "probes at step 2: held-out loss 0.250  perplexity 12.346"
    assert out[1].startswith("step 2/6  loss 0.500")
