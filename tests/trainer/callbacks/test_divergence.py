"""NaN and infinity: found in the step in which they begin, explained, never saved."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from eaftdrope import EAFTTrainer, UserError, apply_eaft
from eaftdrope.trainer.callbacks.divergence import Watch
from eaftdrope.trainer.finite import non_finite_weights
from tests.trainer.processes import run_two
from tests.trainer.test_invariance import arguments
from tests.trainer.tiny import ragged_rows, tiny_model


def make_trainer(folder, tokenizer, model=None, *, rows=None, **options):
    defaults = dict(per_device_train_batch_size=2, max_steps=12, learning_rate=1e-4, logging_steps=50)
    return EAFTTrainer(
        model or tiny_model(),
        arguments(folder, **{**defaults, **options}),
        train_dataset=ragged_rows(8) if rows is None else rows,
        processing_class=tokenizer,
    )


@pytest.fixture(params=["at once", "later"])
def reading(request, monkeypatch):
    """How a watch is read: on a CPU in every step, on a GPU at logs, saves and the end."""
    if request.param == "later":
        monkeypatch.setattr(Watch, "is_free", property(lambda self: False))
    return request.param


def plant(trainer, step, *, what=math.nan):
    """Makes the loss of the second of two micro-batches of a step `what`; returns all batches that were seen."""
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"])
        loss = original(model, inputs, *args, **kwargs)
        return loss * what if len(seen) == 2 * step else loss

    trainer.compute_loss = compute_loss
    return seen


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("step", [3, 7])
def test_one_bad_batch_costs_no_checkpoint(tmp_path, word_tokenizer, reading, step):
    """Saved at every step, two kept, not logged until 50: the good ones are not rotated away, and the rows are named, in
    the first epoch (2 steps) and a later one."""
    rows = ragged_rows(8)
    rows = rows.add_column("origin", [f"rows.jsonl:{number}" for number in range(1, 9)])
    saving = dict(save_strategy="steps", save_steps=1, save_total_limit=2, gradient_accumulation_steps=2)
    trainer = make_trainer(tmp_path, word_tokenizer, rows=rows, **saving)
    seen = plant(trainer, step)
    with pytest.raises(UserError) as error:
        trainer.train()
    lengths = {len(row["input_ids"]): row["origin"] for row in rows}
    bad = [lengths[int((ids != word_tokenizer.pad_token_id).sum())] for ids in seen[2 * step - 1]]
    text = str(error.value)
    assert text.startswith(
        f"training diverged: the loss became NaN or infinite in step {step} (rows {bad[0]}, {bad[1]})."
    )
    assert f"{tmp_path / f'checkpoint-{step - 1}'} has finite weights, and the same command resumes from it" in text
    assert "--overwrite" not in text
    # the step was not taken yet, so the weights say where to look
    rows_first = "All weights are still finite and of ordinary size (at most " in text
    assert rows_first if reading == "at once" else "The first suspect is the learning rate (0.0001)" in text
    assert checkpoints(tmp_path) == [f"checkpoint-{step - 2}", f"checkpoint-{step - 1}"]
    for name in checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / name / "model.safetensors").values())
    # and so it does
    again = make_trainer(tmp_path, word_tokenizer, rows=rows, **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12


def test_without_a_save_or_a_log_it_stops_at_the_end(tmp_path, word_tokenizer, reading):
    trainer = make_trainer(tmp_path, word_tokenizer, learning_rate=1e30)
    with pytest.raises(UserError) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith("training diverged: the gradient norm became NaN or infinite in step 2 (rows ")
    assert "The first suspect is the learning rate (1e+30): lower it" in text
    assert text.endswith("No checkpoint was written before it: start over (a recipe with --overwrite).")


def test_weights_that_the_last_step_broke_end_the_training(tmp_path, word_tokenizer):
    """Every loss and gradient was finite."""
    trainer = make_trainer(tmp_path, word_tokenizer, max_steps=2)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.norm.weight.data[3] = math.inf

    trainer.add_callback(Break())
    with pytest.raises(UserError, match=r"^the weights contain NaN or infinity after step 2 \(model\.norm\.weight\)"):
        trainer.train()
    with pytest.raises(UserError, match="and are not saved"):
        trainer.save_model(str(tmp_path / "result"))
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("gate", "options"),
    [("eaft", {"divisor": 1e-300}), ("constant", {"weight": 1e38}), ("constant", {"weight": 1e30})],
    ids=["divisor", "loss overflows", "gradient overflows"],
)
def test_a_gate_out_of_range_is_the_suspect(tmp_path, word_tokenizer, reading, gate, options):
    trainer = make_trainer(tmp_path, word_tokenizer, gate=gate, gate_kwargs=options)
    with pytest.raises(UserError, match=rf"in step 1 .*The gate's own values are out of range.* the gate {gate}\("):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_before_anything(tmp_path, word_tokenizer, value):
    models = [tiny_model(), tiny_model()]
    for model in models:
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    message = "contain NaN or infinity before any training: model.layers.1.mlp.up_proj.weight. Its files are damaged"
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, word_tokenizer, models[0])
    with pytest.raises(UserError, match=message):
        apply_eaft(models[1])
    assert non_finite_weights(models[1]) == ["model.layers.1.mlp.up_proj.weight"]


def test_finite_weights_whose_logits_are_not(tmp_path):
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 1e30
        layer.mlp.up_proj.weight.data *= 1e30
    with pytest.raises(UserError, match=r"gives logits that are NaN or infinite .* all of its weights are finite"):
        apply_eaft(model)


def break_optimizer(checkpoint, value):
    state = torch.load(checkpoint / "optimizer.pt")
    state["state"][0]["exp_avg"][:] = value
    torch.save(state, checkpoint / "optimizer.pt")


def break_weights(checkpoint, value):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "value", "message"),
    [
        (break_optimizer, math.nan, "NaN or infinity in the optimiser state of .*checkpoint-4: .*exp_avg. Nothing was"),
        (break_weights, math.nan, "NaN or infinity in the weights of .*checkpoint-4: model.norm.weight. Nothing was"),
        (break_optimizer, 1e38, "within 5 steps of resuming, so the first suspect is a damaged .* in checkpoint-4"),
    ],
)
def test_a_damaged_checkpoint_is_the_suspect(tmp_path, word_tokenizer, damage, value, message):
    saving = dict(save_strategy="steps", save_steps=2)
    make_trainer(tmp_path, word_tokenizer, max_steps=4, **saving).train()
    damage(tmp_path / "checkpoint-4", value)
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, word_tokenizer).train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_parameters_outside_of_the_optimiser_are_refused(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer)
    kept = [parameter for name, parameter in trainer.model.named_parameters() if name != "model.norm.weight"]
    trainer.optimizer = torch.optim.SGD(kept, lr=1e-3)
    with pytest.raises(UserError, match=r"^the optimiser does not have model\.norm\.weight: trainable, but"):
        trainer.train()
    trainer.model.model.norm.weight.requires_grad_(False)
    trainer.train()


def test_gates_that_are_all_closed_are_told_once(tmp_path, word_tokenizer):
    trainer = make_trainer(tmp_path, word_tokenizer, gate_kwargs={"alpha": 1e300}, logging_steps=1, max_steps=3)
    with pytest.warns(
        UserWarning, match=r"a mean weight of 0\.0e\+00 \(and cross-entropy is 5\.\d\d\): nothing is trained"
    ) as told:
        trainer.train()
    assert sum("nothing is trained" in str(one.message) for one in told) == 1


def test_an_overflow_of_float16_is_the_scalers_business(tmp_path, word_tokenizer, monkeypatch):
    """It leaves such a step out and lowers its scale."""
    trainer = make_trainer(tmp_path, word_tokenizer)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    trainer._get_grad_norm(trainer.model, torch.tensor(math.inf))
    assert trainer._guard.watch.read() is None


def test_noting_waits_for_no_device():
    """On the meta device a read of a value is an error."""
    device = torch.device("meta")
    watch = Watch(device, accumulation=2)
    for step in (1, 2):
        for _ in range(2):
            watch.add_loss(step, torch.zeros((), device=device), torch.zeros((), dtype=torch.bool, device=device))
        watch.add_gradient(step, torch.zeros((), device=device))
    with pytest.raises(NotImplementedError):
        watch.read()


WORKER = """
import sys, math, os
from pathlib import Path
from tests.tiny_models import make_word_tokenizer
from eaftdrope import UserError
from tests.forked import end_together
from tests.trainer.callbacks.test_divergence import make_trainer
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
saving = dict(save_strategy="steps", save_steps=1, save_total_limit=2, gradient_accumulation_steps=2)
trainer = make_trainer(folder, make_word_tokenizer(), per_device_train_batch_size=1, **saving)
original, seen = trainer.compute_loss, []
def compute_loss(model, inputs, *args, **kwargs):
    seen.append(inputs["input_ids"])
    loss = original(model, inputs, *args, **kwargs)
    return loss * math.nan if rank == 1 and len(seen) == 6 else loss
trainer.compute_loss = compute_loss
try:
    trainer.train()
except UserError as error:
    (folder / f"error-{rank}").write_text(str(error))
    (folder / f"length-{rank}").write_text(str(seen[5].shape[1]))
end_together()
"""


@pytest.mark.slow
def test_processes_stop_together(tmp_path):
    """A loss is NaN in one process: both stop at the save after it, and name the row of that process."""
    run_two(WORKER, tmp_path)
    first, second = ((tmp_path / f"error-{rank}").read_text() for rank in (0, 1))
    assert first == second
    row = [len(row["input_ids"]) for row in ragged_rows(8)].index(int((tmp_path / "length-1").read_text()))
    assert first.startswith(
        f"training diverged: the loss became NaN or infinite in step 3 (rows {row} of the training set, from 0)."
    )
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
