"""A plain Trainer that is told to stop, saves the step, and continues to the weights of one that was not."""

import os
import signal
import threading

import pytest
from transformers import TrainerControl, TrainerState

from eaftdrope.trainer import SaveAndStop
from eaftdrope.trainer.callbacks.metrics import BoundedHistory
from tests import forked

PLAIN = """
import os, signal, sys
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from eaftdrope.trainer import EAFTCallback, SaveAndStop, apply_eaft
from tests.trainer.tiny import ragged_rows, tiny_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

class Signal(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

def run(folder, *callbacks, resume=None):
    arguments = TrainingArguments(
        folder, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=100, seed=1,
        learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )
    trainer = Trainer(
        apply_eaft(tiny_model()), arguments, train_dataset=ragged_rows(24), callbacks=[EAFTCallback(), *callbacks],
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer

place = sys.argv[1]
stop = SaveAndStop()
trainer = run(place + "/stopped", stop, Signal())
assert stop.received == signal.SIGTERM and trainer.state.global_step == 3
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
resumed = run(place + "/stopped", SaveAndStop(), resume=place + "/stopped/checkpoint-3")
whole = run(place + "/whole")
for (name, weight), other in zip(resumed.model.named_parameters(), whole.model.parameters()):
    assert weight.equal(other), name
"""


def test_a_plain_trainer(tmp_path):
    """In the middle of an accumulation, with the gate's own callback beside it."""
    ended = forked.run_source(PLAIN, tmp_path)
    assert ended.code == 0, ended.err


def begun(**options):
    from transformers import TrainingArguments

    callback = SaveAndStop(**options)
    arguments = TrainingArguments("unused", report_to="none", use_cpu=True)
    state = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(arguments, state, TrainerControl())
    return callback, arguments, state


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    callback, *_ = begun()
    assert signal.getsignal(signal.SIGTERM) == callback._receive
    callback.close()
    callback.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c(capfd):
    callback, arguments, state = begun()
    try:
        callback._receive(signal.SIGINT, None)
        assert capfd.readouterr().err == "\nCtrl-C: saving at the end of this step, or Ctrl-C again to end at once\n"
        with pytest.raises(KeyboardInterrupt):
            callback._receive(signal.SIGINT, None)
        control = TrainerControl()
        callback.on_step_end(arguments, state, control)
        assert (control.should_save, control.should_log, control.should_training_stop) == (True, True, True)
        assert callback.received == signal.SIGINT
    finally:
        callback.close()


def test_a_worker_of_a_data_loader_survives_the_first_signal():
    """A launcher signals whole groups of processes, and the step still needs its batch; its parent ends it with a second."""
    callback, *_ = begun()
    try:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        callback.close()


def test_in_another_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=begun)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_history_is_bounded():
    """The last entry with the totals stays, however many others come after it."""
    state, callback = TrainerState(), BoundedHistory()
    for step in range(300):
        state.log_history.append({"step": step, **({"eaft/trained_tokens": step} if step < 150 else {})})
        callback.on_log(None, state, TrainerControl())
        assert len(state.log_history) <= 101
    totals = [entry["eaft/trained_tokens"] for entry in state.log_history if "eaft/trained_tokens" in entry]
    assert totals == [149]
    assert [entry["step"] for entry in state.log_history] == [149, *range(200, 300)]
