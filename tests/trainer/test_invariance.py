"""Gradients do not depend on how a batch is cut into accumulation steps or processes."""

import pytest
import torch
from transformers import TrainerCallback

from eaftdrope import EAFTConfig, EAFTTrainer, eaft_loss
from tests.trainer.processes import run_two
from tests.trainer.tiny import ragged_rows, tiny_model


class KeepGradients(TrainerCallback):
    """The gradients of the first optimiser step."""

    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    return EAFTConfig(**{**defaults, **options})


def gradients(folder, tokenizer, batch, accumulation, model=None, **options):
    keep = KeepGradients()
    trainer = EAFTTrainer(
        model or tiny_model(),
        arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **options),
        train_dataset=ragged_rows(8),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    return keep.gradients, trainer


def direct_gradients(gate, model=None, rows=8):
    """One backward of the definition over all rows, in float64."""
    model = (model or tiny_model()).double()
    logits, labels = [], []
    for row in ragged_rows(rows):
        logits.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels.append(torch.tensor(row["labels"][1:]))
    eaft_loss(torch.cat(logits), torch.cat(labels), gate).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in actual:
        error = (actual[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error <= tolerance, (name, error.item())


# in float64 nothing hides an error of scale or count
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8), (3, 3)])
@pytest.mark.parametrize("gate", ["eaft", "none"])
def test_equal_to_the_definition_over_all_rows(tmp_path, word_tokenizer, batch, accumulation, gate):
    model = tiny_model(dtype=torch.float64)
    actual, trainer = gradients(tmp_path, word_tokenizer, batch, accumulation, model=model, gate=gate)
    assert trainer.state.global_step == 1
    assert_same(actual, direct_gradients(gate), 1e-10)


def test_float32_over_batch_and_accumulation(tmp_path, word_tokenizer):
    expected, _ = gradients(tmp_path, word_tokenizer, 8, 1)
    assert_same(expected, direct_gradients("eaft"), 1e-5)
    for batch, accumulation in ((4, 2), (1, 8)):
        assert_same(gradients(tmp_path, word_tokenizer, batch, accumulation)[0], expected, 1e-6)


def test_with_gradient_checkpointing(tmp_path, word_tokenizer):
    model = tiny_model(dtype=torch.float64)
    actual, _ = gradients(tmp_path, word_tokenizer, 4, 2, model=model, gradient_checkpointing=True)
    assert_same(actual, direct_gradients("eaft"), 1e-10)


def test_untied_head_in_small_tiles(tmp_path, word_tokenizer):
    model = tiny_model(tie_word_embeddings=False, dtype=torch.float64)
    expected = direct_gradients("eaft", tiny_model(tie_word_embeddings=False))
    actual, _ = gradients(tmp_path, word_tokenizer, 4, 2, model=model, loss_tile_bytes=128 * 8 * 5)
    assert_same(actual, expected, 1e-10)


WORKER = """
import sys, torch
from tests.conftest import make_word_tokenizer
from tests.trainer.processes import end_together
from tests.trainer.test_invariance import gradients
folder, target = sys.argv[1:3]
found, trainer = gradients(folder, make_word_tokenizer(), 2, 2)
if trainer.accelerator.is_main_process:
    found = {name.removeprefix("module."): value for name, value in found.items()}
    log = [entry for entry in trainer.state.log_history if "eaft/gate_mean" in entry]
    torch.save({"gradients": found, "log": log, "processes": trainer.accelerator.num_processes}, target)
end_together()
"""


@pytest.mark.slow
def test_over_two_processes(tmp_path, word_tokenizer):
    target = tmp_path / "gradients.pt"
    run_two(tmp_path, WORKER, tmp_path / "out", target)
    found = torch.load(target)
    assert found["processes"] == 2
    alone, single = gradients(tmp_path / "single", word_tokenizer, 8, 1)
    assert_same(found["gradients"], alone, 1e-6)
    # metrics are over the tokens of both processes
    expected = single.state.log_history[0]
    for key in ("eaft/gate_mean", "eaft/cross_entropy", "entropy", "eaft/trained_tokens", "num_tokens", "loss"):
        assert found["log"][0][key] == pytest.approx(expected[key], rel=1e-5), key
