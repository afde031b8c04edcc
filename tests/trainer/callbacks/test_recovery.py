"""The recovery callback: what it measures when, what it keeps, and where it ends a training; blocks that stay apart."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eaftdrope.errors import UserError
from eaftdrope.trainer.callbacks.recovery import Point, RecoveryCallback, RecoveryCurve
from tests.trainer.tiny import tiny_model

ORIGINAL = math.log(10.0)


def curve(*points, stop_at=None):
    return RecoveryCurve(ORIGINAL, 100, stop_at, tuple(points))


class Run:
    """Steps of a trainer as far as the callback sees them; step n measures the perplexity `falls[n]`."""

    def __init__(self, path, curve, falls, *, every=2, max_steps=6, step=0):
        self.perplexity = falls
        self.state = SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=True)
        self.callback = RecoveryCallback(path, curve, lambda model: math.log(falls[self.state.global_step]), every)
        self.control = SimpleNamespace(should_log=False, should_training_stop=False, should_save=False)
        self.logs = []
        self.callback.on_train_begin(None, self.state, self.control, model=nn.Identity())

    def go(self, until=6):
        while self.state.global_step < until and not self.control.should_training_stop:
            self.state.global_step += 1
            self.control.should_log = False
            self.callback.on_step_end(None, self.state, self.control)
            logs = {"loss": 1.0, "num_tokens": 50.0 * self.state.global_step}
            # a log without training figures (an evaluation) takes nothing
            for log in ({"eval_loss": 1.0}, logs) if self.control.should_log else ():
                self.callback.on_log(None, self.state, self.control, logs=log, model=nn.Identity())
                self.logs.append((self.state.global_step, log))
        return self


FALLS = {0: 40.0, 1: 40.0, 2: 25.0, 3: 22.0, 4: 20.0, 5: 16.0, 6: 12.5, 7: 11.0}


def test_measured_at_the_start_now_and_then_and_at_the_end(tmp_path):
    run = Run(tmp_path / "recovery.json", curve(), FALLS, every=4, max_steps=7).go(7)
    kept = json.loads((tmp_path / "recovery.json").read_text())
    assert [(point["step"], point["tokens"]) for point in kept["points"]] == [(0, 0), (4, 200), (7, 350)]
    assert [point["perplexity"] for point in kept["points"]] == pytest.approx([40.0, 20.0, 11.0])
    assert [point["recovery"] for point in kept["points"]] == pytest.approx([0.25, 0.5, 10 / 11])
    assert kept["original"]["perplexity"] == pytest.approx(10.0)
    assert RecoveryCurve.from_json((tmp_path / "recovery.json").read_text()) == run.callback.curve
    measured = [(step, log) for step, log in run.logs if "recovery" in log]
    assert [step for step, _ in measured] == [4, 7]
    assert [log["recovery/perplexity"] for _, log in measured] == pytest.approx([20.0, 11.0])
    assert [file.name for file in tmp_path.iterdir()] == ["recovery.json"]


def test_a_step_that_would_not_be_logged_is(tmp_path):
    """The training may log every tenth step; what is measured in between is logged with it."""
    run = Run(tmp_path / "recovery.json", curve(), FALLS, every=3)
    run.go()
    assert sorted({step for step, _ in run.logs}) == [3, 6]


def test_a_resumed_run_goes_on_with_the_curve(tmp_path):
    path = tmp_path / "recovery.json"
    whole = Run(path, curve(), FALLS).go().callback.curve
    # killed after step 5, its last checkpoint is that of step 3
    resumed = Run(path, whole.up_to(5), FALLS, step=3).go().callback.curve
    assert resumed == whole
    assert [point.step for point in whole.points] == [0, 2, 4, 6]


def test_it_ends_when_enough_is_recovered(tmp_path):
    run = Run(tmp_path / "recovery.json", curve(stop_at=0.5), FALLS).go()
    assert (run.state.global_step, run.control.should_save) == (4, True)
    found = run.callback.curve
    assert found.stopped_after(4)
    assert not found.stopped_after(2) and not found.stopped_after(3)
    assert not Run(tmp_path / "recovery.json", curve(), FALLS).go().control.should_training_stop


def test_a_curve_without_a_rule_never_stops():
    assert not curve(Point(2, 100, ORIGINAL - 1)).stopped_after(2)
    assert curve().recovery(ORIGINAL - math.log(2)) == pytest.approx(2.0)


def test_progress_shows_the_last_recovery():
    """Measured at one step, shown until the next measurement; not at all in a run that measures none."""
    import io

    from rich.console import Console
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from eaftdrope.trainer.callbacks.progress import ProgressCallback

    screen = io.StringIO()
    display = ProgressCallback(Console(file=screen, width=200), clock=lambda: 0.0)
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    state, control = TrainerState(max_steps=3, is_world_process_zero=True), TrainerControl()
    display.on_train_begin(arguments, state, control)
    for step, extra in enumerate([{}, {"recovery": 0.876}, {}], start=1):
        state.global_step = step
        display.on_log(arguments, state, control, logs={"loss": 1.0, **extra})
    lines = screen.getvalue().splitlines()
    assert [("recovery 0.88" in line) for line in lines] == [False, True, True]


# ---- documents that do not see each other ----


def dropped_model():
    from eaftdrope.drope.rope import with_rope

    model = tiny_model()
    dropped = type(model)(with_rope(model.config, "nope")).eval()
    dropped.load_state_dict(model.state_dict())
    return dropped


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_separate_documents_are_as_if_alone(attention):
    """What the trainer gives a model without rotary embedding for a batch of blocks: every document's logits are those of
    the document by itself, and its first token is not predicted."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from eaftdrope.data import text_blocks

    model = dropped_model()
    model.set_attn_implementation(attention)
    documents = [[5, 6, 7, 2], [8, 9, 2], [10, 11, 12, 13, 14, 2], [15, 2]]
    rows = Dataset.from_dict({"input_ids": documents, "labels": documents, "origin": list("abcd")})
    blocks = text_blocks(rows, length=5, eos=2, boundaries=True)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(blocks.to_list())
    parts = [ids for block in blocks for ids in torch.tensor(block["input_ids"]).split(block["seq_lengths"])]
    assert [len(part) for part in parts] == [4, 1, 2, 3, 3, 2]
    with torch.no_grad():
        # as the trainer calls it
        packed = {key: batch[key] for key in ("input_ids", "position_ids")}
        together = model(**packed, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    first = torch.tensor([0, *torch.tensor([len(part) for part in parts]).cumsum(0)[:-1].tolist()])
    assert (batch["labels"][0, first] == -100).all()
    assert (batch["labels"][0] != -100).sum() == 15 - len(parts)


def test_a_model_that_would_mix_them_is_refused(monkeypatch):
    """Asked of the model itself; here one whose attention looks at no positions."""
    from eaftdrope.trainer.packing import check_packing

    model = tiny_model()
    check_packing(model)
    original = type(model.model).forward

    def mixing(self, *args, position_ids=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", mixing)
    with pytest.raises(UserError, match="lets packed sequences attend to each other"):
        check_packing(model)
