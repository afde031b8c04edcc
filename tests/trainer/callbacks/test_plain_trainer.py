"""`apply_eaft` and `EAFTCallback` with the plain Trainer: where its metrics go, bf16, and a training that diverges."""

import pytest
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from eaftdrope import EAFTCallback, UserError, apply_eaft
from tests.trainer.tiny import ragged_rows, tiny_model


class Tracker(TrainerCallback):
    """Stands before the callback, as the Trainer's own trackers do, and copies a log as it finds it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder, tokenizer, *callbacks, gate_options=None, **options):
    defaults = dict(max_steps=4, use_cpu=True, logging_steps=2, report_to="none", disable_tqdm=True, save_strategy="no")
    return Trainer(
        apply_eaft(tiny_model(), **(gate_options or {})),
        TrainingArguments(str(folder), per_device_train_batch_size=2, **{**defaults, **options}),
        train_dataset=ragged_rows(8),
        eval_dataset=ragged_rows(3, seed=9),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("added", ["at construction", "later"])
def test_metrics_reach_the_history_and_the_trackers(tmp_path, word_tokenizer, bf16, added):
    """With bf16 accelerate wraps the forward; the gate is trained all the same."""
    tracker = Tracker()
    first = [tracker, EAFTCallback()] if added == "at construction" else [tracker]
    trainer = make_trainer(tmp_path, word_tokenizer, *first, bf16=bf16, eval_strategy="steps", eval_steps=2)
    if added == "later":
        trainer.add_callback(EAFTCallback())
    trainer.train()
    training, evaluation = trainer.state.log_history[:2]
    assert 0 < training["eaft/gate_mean"] < 1
    assert training["loss"] == pytest.approx(training["eaft/weighted_loss"], rel=2e-2)
    assert evaluation["eval_loss"] > 0 and evaluation["eval_entropy"] > 0
    assert not {"entropy", "eaft/gate_mean", "eval_eaft/gate_mean"} & evaluation.keys()
    # before the history, the summary of the training has no metrics
    for logged, kept in zip(tracker.logs, trainer.state.log_history, strict=True):
        assert logged.keys() == kept.keys() - {"step"}


def test_a_training_that_diverges_is_stopped_before_it_is_saved(tmp_path, word_tokenizer):
    saving = dict(save_strategy="steps", save_steps=1, logging_steps=50, learning_rate=1e30)
    trainer = make_trainer(tmp_path, word_tokenizer, EAFTCallback(), **saving)
    with pytest.raises(UserError, match=r"^training diverged: the gradient norm became NaN or infinite in step 2"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_broken_weights_are_not_saved(tmp_path, word_tokenizer, strategy):
    """By step, by epoch (of four), and not at all: then it is found at the end."""

    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.model.norm.weight.data[3] = float("nan")

    saving = dict(save_strategy=strategy, save_steps=4, logging_steps=50)
    trainer = make_trainer(tmp_path, word_tokenizer, EAFTCallback(), Break(), **saving)
    with pytest.raises(UserError, match=r"^the weights contain NaN or infinity after step 4 \(model.norm.weight\)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_gates_options_are_suspected_and_closed_gates_told(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer, EAFTCallback(), gate_options={"divisor": 1e-300})
    with pytest.raises(UserError, match=r"in step 1 .*out of range: check the options of the gate eaft\(alpha=1.0"):
        trainer.train()
    trainer = make_trainer(tmp_path, word_tokenizer, EAFTCallback(), gate_options={"alpha": 1e300})
    with pytest.warns(UserWarning, match="nothing is trained"):
        trainer.train()
